#!/usr/bin/env bash
# Installs one part of the pinned stack, for the Makefile.
# usage: VENV=.venv PYTHON=python3 install.sh PART
# parts: venv toolchain build classification package detection dev release
#        floor-torch oldest-torch newest-torch
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${VENV:-.venv}
py=$venv/bin/python
export PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_INPUT=1

die() {
  echo "ddf_mm: $*" >&2
  exit 1
}

# Bytecode is not compiled in CI, which imports a small part of all modules.
pip_install() {
  "$py" -m pip install ${CI:+--no-compile} "$@"
}

make_venv() {
  local python=${PYTHON:-python3}
  command -v "$python" > /dev/null ||
    die "$python was not found: install Python >= 3.10 (Debian/Ubuntu: apt-get install python3)"
  # An existing environment keeps its Python.
  if [ -x "$py" ]; then python=$py; fi
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    die "$python is $("$python" --version 2>&1), Python >= 3.10 is needed: set PYTHON=..."
  if [ -x "$py" ] && "$py" -m pip --version > /dev/null 2>&1; then return; fi
  # Debian and Ubuntu package ensurepip separately; without it venv leaves a broken environment.
  if "$python" -c 'import ensurepip, venv' 2> /dev/null; then
    "$python" -m venv "$venv"
  elif "$python" -c 'import virtualenv' 2> /dev/null; then
    "$python" -m virtualenv -q "$venv"
  else
    die "$python cannot make virtual environments: install python3-venv" \
      "(Debian/Ubuntu: apt-get install python3-venv)"
  fi
}

# opencv-python needs libGL.so.1, which a machine without a desktop lacks.
use_loadable_opencv() {
  if "$py" -c 'import cv2' 2> /dev/null; then return; fi
  local version
  version=$("$py" -c 'from importlib.metadata import version; print(version("opencv-python"))' \
    2> /dev/null) || die "OpenCV cannot be imported: $("$py" -c 'import cv2' 2>&1 | tail -n 1)"
  echo "ddf_mm: opencv-python cannot be loaded here (as a rule libGL.so.1 is missing):" \
    "opencv-python-headless $version takes its place"
  "$py" -m pip uninstall -q -y opencv-python
  pip_install -q --no-deps --force-reinstall "opencv-python-headless==$version"
  "$py" -c 'import cv2'
}

install_classification() { # with the versions of $1
  # mmcv without its ops, since pip's isolated build has no torch; mmpretrain does not need them.
  # Not from pip's cache, which may have a build for another torch under the same name.
  pip_install --no-cache-dir --no-deps -c "$here/classification.txt" onedl-mmcv
  pip_install -c "$here/$1.txt" -r "$here/classification.txt"
  use_loadable_opencv
}

install_package() {
  local log=$venv/ddf_mm-install.log line
  # No isolation, so that the ops are compiled against the torch that will load them. Of pip's
  # output, only setup.py's decisions and the compiler's progress are shown.
  if ! pip_install -v --no-build-isolation --no-deps -e "$here/.." 2>&1 |
    tee "$log" |
    while IFS= read -r line; do
      if [[ $line =~ ddf_mm:\ .* ]]; then
        echo "${BASH_REMATCH[0]}"
      elif [[ $line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]]; then
        echo "ddf_mm: ops: ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files compiled"
      fi
    done; then
    tail -n 30 "$log" >&2
    die "installing ddf_mm failed; the log is $log"
  fi
}

# mmcv's ops are compiled once for each torch and Python and cached outside the checkout.
mmcv_wheel_folder() {
  local torch python
  torch=$(sed -n 's/^torch==//p' "$here/build.txt")
  python=$("$py" -c 'import sys; print("cp%d%d" % sys.version_info[:2])')
  echo "${XDG_CACHE_HOME:-$HOME/.cache}/ddf_mm/wheels/torch$torch-$python$(
    [ "${FORCE_CUDA:-0}" != 1 ] || echo -cuda)"
}

mmcv_wheel() { # the newest wheel in folder $1; fails if there is none
  ls -t "$1"/onedl_mmcv-*.whl 2> /dev/null | head -n 1 | grep .
}

# Checked before anything large is installed.
check_toolchain() {
  if mmcv_wheel "$(mmcv_wheel_folder)" > /dev/null; then return; fi
  local compiler header
  read -r compiler _ <<< "${CXX:-c++}"
  command -v "$compiler" > /dev/null ||
    die "mmcv's ops need a C++ compiler, $compiler was not found (Debian/Ubuntu: apt-get install g++)"
  header=$("$py" -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h
  [ -f "$header" ] ||
    die "mmcv's ops need $header: install python3-dev (Debian/Ubuntu: apt-get install python3-dev)"
}

mmcv_ops_load() {
  "$py" -c 'import torch, mmcv._ext'
}

install_mmcv_wheel() { # from folder $1
  local wheel
  wheel=$(mmcv_wheel "$1") || return 1
  if pip_install -q --force-reinstall --no-deps "$wheel" && mmcv_ops_load; then return; fi
  echo "ddf_mm: $wheel has no ops that load with this torch" >&2
  return 1
}

build_mmcv_wheel() { # into folder $1
  local log=$1/build.log parts=$1/unfinished line
  echo "ddf_mm: building mmcv's ops for this torch, once (about 8 minutes on two cores)"
  rm -rf "$parts" && mkdir -p "$parts"
  # The tests need only mmcv's CPU ops; its CUDA ops take far longer to compile.
  if [ "${FORCE_CUDA:-0}" != 1 ]; then export CUDA_VISIBLE_DEVICES=; fi
  # -g0: Python's flags have -g, which doubles the time. --no-cache-dir: see above. PATH: for ninja.
  if ! PATH="$(cd "$venv/bin" && pwd):$PATH" MAX_JOBS="${MAX_JOBS:-$(nproc)}" \
    CFLAGS="-g0 ${CFLAGS:-}" "$py" -m pip wheel -v --no-cache-dir --no-deps --no-build-isolation \
    -c "$here/classification.txt" -w "$parts" onedl-mmcv 2>&1 |
    tee "$log" |
    while IFS= read -r line; do
      if [[ $line =~ ^\ *\[([0-9]+)/([0-9]+)\] ]]; then
        echo "ddf_mm: mmcv's ops: ${BASH_REMATCH[1]} of ${BASH_REMATCH[2]} files compiled"
      fi
    done; then
    tail -n 30 "$log" >&2
    die "building mmcv's ops failed; the log is $log"
  fi
  # Moved atomically, so that a concurrent reader never sees an incomplete wheel.
  mv -f "$parts"/onedl_mmcv-*.whl "$1"/ && rmdir "$parts"
}

install_mmcv_ops() {
  if mmcv_ops_load 2> /dev/null; then return; fi
  local folder
  folder=$(mmcv_wheel_folder)
  mkdir -p "$folder"
  if install_mmcv_wheel "$folder"; then return; fi
  build_mmcv_wheel "$folder"
  install_mmcv_wheel "$folder" || die "mmcv's ops were built into $folder but cannot be loaded"
}

install_detection() {
  install_mmcv_ops
  pip_install -c "$here/build.txt" -c "$here/classification.txt" -r "$here/detection.txt"
  use_loadable_opencv
}

install_other_torch() { # of the requirements $1
  make_venv
  pip_install -r "$here/$1.txt" -c "$here/dev.txt" pytest pytest-xdist hypothesis
  case $1 in
    floor-torch) install_classification "$1" ;;
    oldest-torch) use_loadable_opencv ;;
  esac
}

case ${1:-} in
  venv) make_venv ;;
  toolchain) check_toolchain ;;
  build) pip_install -r "$here/build.txt" ;;
  classification) install_classification build ;;
  package) install_package ;;
  detection) install_detection ;;
  dev) pip_install -c "$here/build.txt" -r "$here/dev.txt" -r "$here/docs.txt" ;;
  release) pip_install -c "$here/build.txt" -r "$here/release.txt" ;;
  floor-torch | oldest-torch | newest-torch) install_other_torch "$1" ;;
  *) die "install.sh: unknown part '${1:-}'; its first lines list them" ;;
esac
