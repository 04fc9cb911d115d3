#!/usr/bin/env bash
# Everything a build needs, on Debian 12 with Rust, Python 3 and apt: Open MPI, libclang, a C++ compiler, libtorch 2.11.0.
# Leaves .deps/libtorch and .deps/torch-lib, where .cargo/config.toml looks. A second run does nothing and says so.
#
#   LIBTORCH=DIR scripts/setup.sh    use that libtorch 2.11 (a folder with include/ and lib/, or a wheel's torch/)
#   PYTHON=python3.x                 the Python that downloads, and that is asked for an installed torch
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
did=0
if [ -n "${RUSTFLAGS:-}${CARGO_ENCODED_RUSTFLAGS:-}" ]; then
    echo "setup: warning: RUSTFLAGS is set, and cargo leaves out what .cargo/config.toml says: add its two link arguments, or unset it" >&2
fi
python=${PYTHON:-python3}
torch_version=2.11.0
# torch without its CUDA libraries, which are 3 GB and not needed to build or to run on the CPU. Pins: see Cargo.toml, tch.
wheels=("torch==$torch_version" nvidia-cuda-runtime==13.0.96 nvidia-cuda-cupti==13.0.85 nvidia-cuda-crt==13.0.88)

say() { echo "setup: $*"; }
fail() { echo "setup: error: $*" >&2; exit 1; }
. scripts/apt.sh

# --- Debian packages -------------------------------------------------------------------------------------------------
elsewhere=" (a libclang elsewhere: LIBCLANG_PATH names its folder)"
missing_packages() {
    command -v g++ >/dev/null || echo g++
    command -v pkg-config >/dev/null || echo pkg-config
    { command -v mpicc && mpicc --showme:version; } >/dev/null 2>&1 || echo libopenmpi-dev
    command -v mpirun >/dev/null || echo openmpi-bin
    [ -n "${LIBCLANG_PATH:-}" ] || libclang || echo libclang-dev
    # pip is for the download of libtorch alone.
    torch_is_here || "$python" -m pip --version >/dev/null 2>&1 || echo python3-pip
}

# Where bindgen looks.
libclang() {
    local folder
    for folder in /usr/lib/llvm-*/lib /usr/lib64 /usr/lib /usr/lib/*-linux-gnu "$(llvm-config --libdir 2>/dev/null || echo /usr/lib)"; do
        if compgen -G "$folder/libclang.so*" >/dev/null || compgen -G "$folder/libclang-[0-9]*.so*" >/dev/null; then return 0; fi
    done
    return 1
}

# --- libtorch --------------------------------------------------------------------------------------------------------
# The version a torch folder says it has: a wheel's version.py or a libtorch archive's build-version.
version_of() {
    if [ -f "$1/build-version" ]; then
        head -n1 "$1/build-version"
    elif [ -f "$1/version.py" ]; then
        sed -n "s/^__version__ = '\(.*\)'/\1/p" "$1/version.py"
    fi
}

check_torch() { # DIR, where it was named
    local version
    [ -f "$1/lib/libtorch_cpu.so" ] && [ -d "$1/include" ] || fail "$2 is $1, which has no lib/libtorch_cpu.so and include/"
    version=$(version_of "$1")
    case "$version" in
        "$torch_version" | "$torch_version"+*) ;;
        *) fail "$2 is $1, which is torch '${version:-of unknown version}'; $torch_version is needed" ;;
    esac
}

# An installed torch is used when it is the right one; another version is only mentioned, since the lean one stands beside it.
installed_torch() {
    "$python" - <<'PY' 2>/dev/null || true
import importlib.util
spec = importlib.util.find_spec("torch")
if spec and spec.submodule_search_locations:
    print(list(spec.submodule_search_locations)[0])
PY
}

# The libtorch that the user named. .cargo/config.toml sets LIBTORCH to our own view inside cargo; that is no choice of theirs.
chosen_torch() {
    [ -z "${LIBTORCH:-}" ] || [ "$(realpath -m "$LIBTORCH")" = "$(pwd -P)/.deps/libtorch" ] || realpath -m "$LIBTORCH"
}

# Whether set_up_torch finds one, and downloads none.
torch_is_here() {
    local found
    [ -n "$(chosen_torch)" ] || view_is_whole || [ -d .deps/site/torch ] ||
        { found=$(installed_torch) && [ -n "$found" ] && [[ $(version_of "$found") == "$torch_version"* ]]; }
}

# .deps/libtorch is what torch-sys builds against, .deps/torch-lib what the binaries' rpath names.
make_view() { # TORCH_DIR, absolute or relative to .deps
    local torch=$1 real=$1 up=$1 up2=$1 library
    case "$torch" in /*) ;; *) real=.deps/$torch up=../$torch up2=../../$torch ;; esac
    rm -rf .deps/libtorch.new .deps/libtorch .deps/torch-lib
    mkdir -p .deps/libtorch.new/lib
    ln -s "$up/include" .deps/libtorch.new/include
    for library in "$real"/lib/{libc10.so,libc10_cuda.so,libtorch_cpu.so,libgomp*}; do
        [ ! -e "$library" ] || ln -s "$up2/lib/${library##*/}" .deps/libtorch.new/lib/
    done
    # Only the CPU half is linked; the CUDA half is opened at run time where there is one.
    echo 'INPUT(-ltorch_cpu)' >.deps/libtorch.new/lib/libtorch.so
    echo "$torch_version+cpu" >.deps/libtorch.new/build-version
    ln -s "$torch/lib" .deps/torch-lib
    mv .deps/libtorch.new .deps/libtorch
    did=1
}

view_is_whole() {
    [ -f .deps/libtorch/include/torch/csrc/api/include/torch/torch.h ] && [ -f .deps/libtorch/lib/libtorch.so ] &&
        [ -e .deps/libtorch/lib/libc10.so ] && [ .deps/libtorch/lib/libtorch_cpu.so -ef .deps/torch-lib/libtorch_cpu.so ] &&
        [ "$(cat .deps/libtorch/build-version)" = "$torch_version+cpu" ]
}

download_torch() {
    local start=$SECONDS
    say "downloading with pip (543 MB): ${wheels[*]}"
    rm -rf .deps/site .deps/site.new
    mkdir -p .deps
    PIP_ROOT_USER_ACTION=ignore "$python" -m pip install --quiet --no-input --no-deps --disable-pip-version-check --target .deps/site.new "${wheels[@]}" </dev/null ||
        fail "pip could not install ${wheels[*]} for $("$python" --version)"
    check_torch .deps/site.new/torch "the downloaded torch"
    mv .deps/site.new .deps/site # whole or absent: an interrupted download is not taken for a finished one
    say "pip: $((SECONDS - start)) s, $(du -sh .deps/site | cut -f1)B on disk in .deps/site"
    did=1
}

set_up_torch() {
    local torch found
    torch=$(chosen_torch)
    [ -z "$torch" ] || check_torch "$torch" LIBTORCH
    if view_is_whole; then
        check_torch .deps/torch-lib/.. ".deps/torch-lib/.."
        [ -n "$torch" ] && [ ! "$torch" -ef .deps/torch-lib/.. ] || return 0
    elif [ -z "$torch" ] && [ -d .deps/site/torch ]; then
        check_torch .deps/site/torch "the torch of an earlier set-up"
        torch=site/torch
    elif [ -z "$torch" ]; then
        found=$(installed_torch)
        if [ -n "$found" ] && [[ $(version_of "$found") == "$torch_version"* ]]; then
            torch=$(realpath "$found")
            check_torch "$torch" "the installed torch"
        else
            [ -z "$found" ] || say "the installed torch is $(version_of "$found"), not $torch_version: leaving it alone"
            download_torch
            torch=site/torch
        fi
    fi
    make_view "$torch"
    view_is_whole || fail "made .deps/libtorch on $torch, but it is not whole"
    say "libtorch $torch_version: .deps/libtorch -> $torch"
}

command -v "$python" >/dev/null || fail "no $python; install python3"
command -v cargo >/dev/null || fail "no cargo; install Rust (rustup.rs), at least the rust-version in Cargo.toml"
install_packages
set_up_torch
if [ $did = 1 ]; then
    say "done in $((SECONDS - started)) s"
else
    say "nothing to do: packages and libtorch $torch_version are in place"
fi
