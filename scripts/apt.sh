# Sourced by the scripts that need Debian packages. They define say and fail, and missing_packages, which prints a name a line.

# Installs what is missing; sets did=1 if that was anything. `elsewhere` is what to say where there is no apt.
install_packages() {
    local packages as_root=()
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} -gt 0 ] || return 0
    if [ "$(id -u)" != 0 ]; then
        command -v sudo >/dev/null || fail "these packages are missing and this user cannot install them: ${packages[*]}
    as root: apt-get install -y --no-install-recommends ${packages[*]}"
        as_root=(sudo)
    fi
    command -v apt-get >/dev/null || fail "no apt-get here; install the equivalents of: ${packages[*]}${elsewhere:-}"
    local start=$SECONDS
    say "downloading with apt: ${packages[*]}"
    "${as_root[@]}" apt-get update -qq || fail "apt-get update failed; needed: ${packages[*]}"
    "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
        apt-get install -y -qq --no-install-recommends "${packages[@]}" >/dev/null </dev/null || fail "apt-get could not install: ${packages[*]}"
    mapfile -t packages < <(missing_packages)
    [ ${#packages[@]} = 0 ] || fail "installed, but still not found: ${packages[*]}"
    say "apt: $((SECONDS - start)) s"
    did=1
}
