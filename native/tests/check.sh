#!/usr/bin/env bash
# Builds the native tests and runs them with each instruction set of this machine, under the address
# and undefined-behaviour sanitizers; the pool also under the thread sanitizer; all of them for NEON
# where a cross compiler and qemu-user are installed. Usage: check.sh [folder for the builds]
set -euo pipefail
native=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
builds=${1:-$native/../build/native-check}
mkdir -p "$builds"

# build NAME TARGET [cmake option...]: quiet unless it fails.
build() {
  local name=$1 target=$2
  shift 2
  cmake -S "$native" -B "$builds/$name" -DSECATEUR_TESTS=ON "$@" >"$builds/$name.log" 2>&1 || {
    cat "$builds/$name.log"
    return 1
  }
  cmake --build "$builds/$name" --target "$target"
}

# run NAME ISA [ctest option...]
run() {
  local name=$1 isa=$2
  shift 2
  SECATEUR_ISA=$isa ctest --test-dir "$builds/$name" --output-on-failure --no-tests=error "$@"
}

export UBSAN_OPTIONS=print_stacktrace=1 ASAN_OPTIONS=detect_stack_use_after_return=1

echo "== address and undefined behaviour"
build sanitized all -DSECATEUR_SANITIZE=ON
for isa in $("$builds/sanitized/isas" | tr ',' ' '); do
  echo "== $isa"
  run sanitized "$isa"
done

# Code that several files may define (templates, inline functions of std::) is kept once. If that
# were the copy compiled for AVX-512, other processors would stop at it.
echo "== the kernels share no code between instruction sets"
if nm -C "$builds"/sanitized/CMakeFiles/kernels_*.dir/kernels/*.o |
  grep -E ' [WVu] ' | grep -v ' DW\.ref\.'; then
  echo "kernels/ defines these for all instruction sets: make them members of the namespace"
  exit 1
fi

echo "== data races in the pool"
"${CXX:-c++}" -std=c++17 -O1 -g -fsanitize=thread -pthread -I"$native/include" \
  "$native/pool.cpp" "$native/tests/test_pool.cpp" -o "$builds/test_pool_races"
# Some kernels place memory where the thread sanitizer of older compilers does not expect it.
fixed=
! setarch -R true 2>/dev/null || fixed='setarch -R'
TSAN_OPTIONS=halt_on_error=1 $fixed "$builds/test_pool_races"

echo "== NEON"
cross=aarch64-linux-gnu
if command -v $cross-g++ >/dev/null && command -v qemu-aarch64 >/dev/null; then
  build neon all -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=$cross-g++ "-DCMAKE_CROSSCOMPILING_EMULATOR=qemu-aarch64;-L;/usr/$cross"
  for isa in $(qemu-aarch64 -L /usr/$cross "$builds/neon/isas" | tr ',' ' '); do
    echo "== $isa"
    run neon "$isa"
  done
else
  echo "skipped: needs $cross-g++ and qemu-aarch64"
  echo "(Debian: apt install g++-$cross qemu-user)"
fi
