#!/bin/bash
# Installs what the guests of the tests need, and fetches their kernel into DIR/kernel:
#
#     upgrade-tests/guest/install.sh DIR
#
# Nothing of the machine is removed or upgraded: apt gets a sources list and lists of its own, in DIR.
# Exit code 3: not possible on this machine; the last line says why.
set -uo pipefail

programs=(qemu-system-x86_64 qemu-img qemu-io qemu-nbd qemu-storage-daemon fio mkfs.xfs xfs_repair
    mkfs.ext4 e2fsck)
packages=(qemu-system-x86 qemu-system-common qemu-block-extra qemu-utils fio xfsprogs e2fsprogs)
driver=/usr/lib/x86_64-linux-gnu/qemu/block-rbd.so
keyring=/usr/share/keyrings/debian-archive-keyring.gpg
export PATH=$PATH:/usr/sbin:/sbin DEBIAN_FRONTEND=noninteractive

impossible() {
    echo "$*"
    exit 3
}

[ $# -eq 1 ] || { echo "usage: $0 DIR" >&2; exit 2; }
mkdir -p "$1" && dir=$(cd "$1" && pwd) || exit 2
[ "$(uname -m)" = x86_64 ] || impossible "the guest is for x86_64"

apt() {
    local program=$1
    shift
    "$program" -q -o Dir::Etc::sourcelist="$dir/apt/sources.list" -o Dir::Etc::sourceparts=- \
        -o Dir::State::lists="$dir/apt/lists" -o Dir::Cache::archives="$dir/apt/archives" \
        -o Dir::Cache::pkgcache= -o Dir::Cache::srcpkgcache= "$@"
}

# prepare WHY: lists of packages that have QEMU 10.
prepare() {
    [ -e "$dir/apt/ready" ] && return
    grep -q VERSION_CODENAME=bookworm /etc/os-release || impossible "$1, and this is not Debian 12"
    [ "$(id -u)" = 0 ] && [ -e "$keyring" ] && command -v apt-get >/dev/null ||
        impossible "$1, and there is no root with apt-get"
    mkdir -p "$dir/apt/lists/partial" "$dir/apt/archives/partial"
    local suite archive
    for suite in bookworm bookworm-updates bookworm-backports bookworm-security; do
        archive=debian
        [ $suite != bookworm-security ] || archive=debian-security
        echo "deb [signed-by=$keyring] http://deb.debian.org/$archive $suite main"
    done >"$dir/apt/sources.list"
    apt apt-get update || impossible "$1, and there is no archive to install from"
    touch "$dir/apt/ready"
}

install_packages() {
    local program missing=()
    for program in "${programs[@]}"; do
        command -v "$program" >/dev/null || missing+=("$program")
    done
    [ -e $driver ] || missing+=("$driver")
    [ ${#missing[@]} -gt 0 ] || return
    prepare "${missing[*]}: not installed"
    # From the backports whatever QEMU needs; nothing that is there goes, or changes.
    apt apt-get install -y -t bookworm-backports --no-install-recommends --no-remove --no-upgrade \
        "${packages[@]}" || impossible "${missing[*]}: cannot be installed"
}

fetch_kernel() {
    compgen -G "$dir/kernel/boot/vmlinuz-*" >/dev/null && return
    prepare "no guest kernel"
    local package
    package=$(apt apt-cache depends linux-image-cloud-amd64 |
        sed -n 's/^ *Depends: \(linux-image-.*\)/\1/p' | head -n 1)
    [ -n "$package" ] || impossible "linux-image-cloud-amd64 depends on no kernel"
    rm -rf "$dir/download" "$dir/kernel" && mkdir "$dir/download" && cd "$dir/download" &&
        apt apt-get download "$package" || impossible "no guest kernel: $package is not to be had"
    dpkg-deb -x "$package"_*.deb "$dir/unpacked" && mv "$dir/unpacked" "$dir/kernel" || exit 1
    rm -rf "$dir/download"
}

install_packages
fetch_kernel
# The lists are stale tomorrow.
rm -rf "$dir/apt"
