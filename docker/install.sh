#!/bin/sh
# Installs the dependencies and the package for Dockerfile and without.sh, with the first pip on the path.
#
#   install.sh torch [DEVICE]     torch and torchvision for cpu, cu126, ...; by default those of PyPI
#   install.sh package SOURCE     this package, from a checkout or a wheel
set -eu

case $1 in
torch) pip install torch torchvision ${2:+--index-url "https://download.pytorch.org/whl/$2"} ;;
package) pip install "$2[export,parquet]" ;;
esac
