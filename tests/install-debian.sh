#!/bin/sh
# Installs the Debian packages named that are missing; says what to do where it may not.
set -eu
missing=
for package; do
    dpkg-query --show --showformat='${Status}' "$package" 2>/dev/null | grep -q 'ok installed' || missing="$missing $package"
done
[ -n "$missing" ] || exit 0
if ! command -v apt-get >/dev/null; then
    echo "This is not Debian or Ubuntu. Please install what these packages hold:$missing" >&2
    exit 1
fi
root=
if [ "$(id -u)" != 0 ]; then
    if ! command -v sudo >/dev/null || ! sudo -n true 2>/dev/null; then
        echo "These packages are missing, and only root may install them. Run: sudo apt-get install$missing" >&2
        exit 1
    fi
    root=sudo
fi
echo "Installing$missing"
export DEBIAN_FRONTEND=noninteractive
# shellcheck disable=SC2086
$root apt-get install -y -qq --no-install-recommends $missing >/dev/null 2>&1 || {
    $root apt-get update -qq
    $root apt-get install -y -qq --no-install-recommends $missing >/dev/null
}
