# Sourced: apt_install PACKAGE... installs Debian or Ubuntu packages, as root or through sudo.
apt_install() {
  local as_root=()
  if [ "$(id -u)" != 0 ]; then
    command -v sudo >/dev/null || { echo "as root: apt-get install $*" >&2; return 1; }
    as_root=(sudo)
  fi
  command -v apt-get >/dev/null || { echo "not Debian or Ubuntu: install by other means: $*" >&2; return 1; }
  "${as_root[@]}" apt-get update -qq
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "$@" >/dev/null
}
