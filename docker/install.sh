#!/bin/sh
# What the image installs, and docker/without.sh too, into the Python that is first on the path.
#
#   install.sh torch [DEVICE]     torch and torchvision: cpu, cu126, ...; without it, what pip finds
#   install.sh package SOURCE     this package, from a checkout or a wheel
set -eu

case $1 in
torch) pip install torch torchvision ${2:+--index-url "https://download.pytorch.org/whl/$2"} ;;
package) pip install "$2[export,parquet]" ;;
esac
