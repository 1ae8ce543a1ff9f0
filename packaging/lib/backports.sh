# shellcheck shell=sh
# Sourced by ../install-deps. Derives an apt source for a release's backports from the Debian source
# that the machine has already, so that no mirror is named here: same address, same keys.
# Tested by ../tests/backports.

# apt_records ETC_APT: every enabled binary source of apt, one a line, fields separated by \001:
#   file, URIs, suites, components, architectures, trusted, check-valid-until, signed-by
# where the lines of a key written into the source itself (Signed-By: with text) are joined by \002.
apt_records() {
    set -- "$1" "$1/sources.list"
    for apt_file in "$1"/sources.list.d/*; do
        # apt itself ignores files with other names.
        case ${apt_file##*/} in
            *[!A-Za-z0-9_.-]*) ;;
            *.list | *.sources) set -- "$@" "$apt_file" ;;
        esac
    done
    shift
    for apt_file; do
        [ -r "$apt_file" ] || continue
        case $apt_file in
            *.sources) apt_deb822 <"$apt_file" ;;
            *) apt_one_line <"$apt_file" ;;
        esac | sed "s|^|$apt_file"'|'
    done
}

# Stanzas of the deb822 form; fields in any case, values may go on in the next lines.
apt_deb822() {
    awk '
        function flush(    joined) {
            if (" " value["types"] " " ~ / deb / && tolower(value["enabled"]) !~ /^(no|false|off|0)$/ && value["uris"] != "")
                printf "\001%s\001%s\001%s\001%s\001%s\001%s\001%s\n", flat("uris"), flat("suites"),
                    flat("components"), flat("architectures"), flat("trusted"),
                    flat("check-valid-until"), value["signed-by"]
            split("", value)
            field = ""
        }
        function flat(name,    text) {
            text = value[name]
            gsub(/[ \t\002]+/, " ", text)
            sub(/^ /, "", text)
            sub(/ $/, "", text)
            return text
        }
        { sub(/\r$/, "") }
        /^#/ { next }
        /^[ \t]*$/ { flush(); next }
        /^[ \t]/ { if (field != "") value[field] = value[field] "\002" $0; next }
        {
            colon = index($0, ":")
            if (!colon) next
            field = tolower(substr($0, 1, colon - 1))
            text = substr($0, colon + 1)
            sub(/^[ \t]+/, "", text)
            sub(/[ \t]+$/, "", text)
            value[field] = text
        }
        END { flush() }
    '
}

# Lines of the older form: deb [option=value ...] URI suite component...
apt_one_line() {
    awk '
        { sub(/\r$/, ""); sub(/#.*/, "") }
        $1 != "deb" { next }
        {
            line = $0
            split("", option)
            sub(/^[ \t]*deb[ \t]+/, "", line)
            if (line ~ /^\[/) {
                end = index(line, "]")
                if (!end) next
                count = split(substr(line, 2, end - 2), words, /[ \t]+/)
                for (i = 1; i <= count; i++) {
                    at = index(words[i], "=")
                    if (at) {
                        text = substr(words[i], at + 1)
                        gsub(/,/, " ", text)
                        option[tolower(substr(words[i], 1, at - 1))] = text
                    }
                }
                line = substr(line, end + 1)
                sub(/^[ \t]+/, "", line)
            }
            count = split(line, words, /[ \t]+/)
            # An installation disc has no backports, and its name has spaces.
            if (count < 3 || words[1] ~ /^cdrom:/) next
            components = words[3]
            for (i = 4; i <= count; i++) if (words[i] != "") components = components " " words[i]
            printf "\001%s\001%s\001%s\001%s\001%s\001%s\001%s\n", words[1], words[2], components,
                option["arch"], option["trusted"], option["check-valid-until"], option["signed-by"]
        }
    '
}

# backports_source ETC_APT CODENAME: prints the source to add, nothing if backports are configured
# already. Exit code 1: no source of Debian's own was found to derive it from.
backports_source() {
    apt_records "$1" | awk -F '\001' -v codename="$2" '
        function has(list, word) { return index(" " list " ", " " word " ") > 0 }
        has($3, codename "-backports") && has($4, "main") { configured = 1 }
        has($4, "main") && (has($3, codename) || has($3, "stable") || has($3, "oldstable")) {
            found++
            record[found] = $0
        }
        # What serves the updates of this release beside it is the archive itself, not a third
        # party that names its own suites after the release.
        has($3, codename "-updates") { updates[$2] = 1 }
        END {
            if (configured) exit 0
            best = -1
            for (i = 1; i <= found; i++) {
                split(record[i], field, "\001")
                score = 0
                if (field[2] in updates) score += 4
                if (has(field[3], codename)) score += 2
                if (field[8] ~ /debian-archive/) score += 2
                if (field[2] ~ /\/debian\/?( |$)/) score += 1
                if (score > best) { best = score; chosen = i }
            }
            if (best < 1) exit 1
            split(record[chosen], field, "\001")
            print "# Made by pileus (packaging/install-deps): the backports of the source in"
            print "# " field[1] ". Packages come from here only when asked for by name."
            print "Types: deb"
            print "URIs: " field[2]
            print "Suites: " codename "-backports"
            print "Components: main"
            if (field[5] != "") print "Architectures: " field[5]
            if (field[6] != "") print "Trusted: " field[6]
            if (field[7] != "") print "Check-Valid-Until: " field[7]
            if (field[8] != "") {
                signed = field[8]
                gsub(/\002/, "\n", signed)
                print "Signed-By: " signed
            }
        }
    '
}
