# shellcheck shell=sh
# Sourced by ../../quickstart and ../../test: is there a Rust toolchain that can build pileus?

# need_rust FOLDER: puts cargo on PATH, or ends with what to do. FOLDER has the Cargo.toml that says
# which version is needed.
need_rust() {
    rust_wanted=$(sed -n 's/^rust-version = "\([0-9.]*\)".*/\1/p' "$1/Cargo.toml" | head -n 1)
    # Where rustup puts it; a shell that was started before that doesn't know.
    if ! command -v cargo >/dev/null && [ -x "${CARGO_HOME:-${HOME:-/root}/.cargo}/bin/cargo" ]; then
        PATH="${CARGO_HOME:-${HOME:-/root}/.cargo}/bin:$PATH"
        export PATH
    fi
    if ! command -v cargo >/dev/null; then
        printf '%s\n' "error: there is no Rust toolchain here (cargo was not found)." \
            "  Install Rust $rust_wanted or newer with rustup, or from your distribution if it has it, and run this again." >&2
        return 1
    fi
    rust_found=$(rustc --version 2>/dev/null | sed -n 's/^rustc \([0-9]*\.[0-9]*\).*/\1/p')
    if [ -z "$rust_found" ]; then
        printf '%s\n' "error: rustc does not run here, though there is cargo." \
            "  Try 'rustc --version'; with rustup, 'rustup default stable' chooses a toolchain." >&2
        return 1
    fi
    if [ "$(printf '%s\n%s\n' "$rust_wanted" "$rust_found" | sort -V | head -n 1)" != "$rust_wanted" ]; then
        printf '%s\n' "error: Rust $rust_found is too old: pileus needs $rust_wanted or newer." \
            "  Update it with 'rustup update', or install a newer one from your distribution, and run this again." >&2
        return 1
    fi
}
