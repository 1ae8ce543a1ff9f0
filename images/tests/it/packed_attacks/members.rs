//! What a tar can be refused for, and odd ones that are fine.

use pileus_images::packed::Rule;

use super::tar::{Header, Tar, record};
use super::{Attack, MACHINE, attack, budgets, disk, good, layer, refused, taken, zst};

/// The two other members.
fn others() -> Tar {
    Tar::default()
        .file("layer.qcow2", &layer())
        .file("machine.json", MACHINE)
}

fn sparse_disk(size: u64, extents: &[(u64, u64)]) -> Tar {
    let stored: u64 = extents.iter().map(|(_, len)| len).sum();
    others().put(
        Header::sparse("disk.img", size, extents),
        &vec![7; stored as usize],
    )
}

/// A sparse disk whose map is the data's beginning.
fn sparse_1_0(size: u64, map: &str, data: &[u8]) -> Tar {
    let mut text = map.as_bytes().to_vec();
    text.resize(text.len().next_multiple_of(512), 0);
    text.extend_from_slice(data);
    others()
        .pax(&pax_1_0(&size.to_string()))
        .file("GNUSparseFile.1/disk.img", &text)
}

fn pax_1_0(size: &str) -> [(&str, &str); 4] {
    [
        ("GNU.sparse.major", "1"),
        ("GNU.sparse.minor", "0"),
        ("GNU.sparse.name", "disk.img"),
        ("GNU.sparse.realsize", size),
    ]
}

pub fn attacks() -> Vec<Attack> {
    let mut all = headers();
    all.extend(names());
    all.extend(pax());
    all.extend(sparse());
    all.extend(sizes());
    all
}

fn headers() -> Vec<Attack> {
    let first_wrong = |at: usize| {
        let mut tar = good().cut();
        tar[at] ^= 1;
        Tar::default().raw(&tar)
    };
    // Where the second header is.
    let second = 512 + disk().len();
    let odd_link = Header::new("extra", 512, b'2').set(157, b"x");
    let numbers = |field: &[u8]| good().put(Header::new("extra", 0, b'0').set(124, field), b"");
    let many = (0..50).fold(good(), |tar, n| tar.file(&format!("extra{n}"), b""));
    vec![
        attack(Rule::NotTar, "text", Tar::default().raw(&[b'x'; 4096])),
        attack(Rule::NotTar, "a damaged first header", first_wrong(0)),
        attack(
            Rule::NotTar,
            "another kind of tar",
            Tar::default().put(Header::new("disk.img", 0, b'0').set(257, b"pileus"), b""),
        ),
        attack(
            Rule::HeaderChecksum,
            "a damaged second header",
            first_wrong(second),
        ),
        attack(
            Rule::HeaderChecksum,
            "a damaged checksum",
            first_wrong(second + 150),
        ),
        attack(
            Rule::HeaderNumber,
            "a negative size",
            numbers(b"\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"),
        ),
        attack(
            Rule::HeaderNumber,
            "a size of 2^63",
            numbers(b"\x80\0\0\0\x80\0\0\0\0\0\0\0"),
        ),
        attack(
            Rule::HeaderNumber,
            "a size in high bytes",
            numbers(b"\x80\x01\0\0\0\0\0\0\0\0\0\0"),
        ),
        attack(
            Rule::HeaderNumber,
            "a size that is a word",
            numbers(b"many\0\0\0\0\0\0\0\0"),
        ),
        attack(
            Rule::MemberData,
            "a link with data",
            good().put(odd_link, &[0; 512]),
        ),
        attack(Rule::TooManyMembers, "fifty more", many),
        attack(
            Rule::Truncated,
            "no member at all behind a header for one",
            good().pax(&[("path", "x")]),
        ),
        attack(
            Rule::TarTrailing,
            "one zero block, then a member",
            good().raw(&[0; 512]).file("extra", b"x"),
        ),
        attack(Rule::Padding, "something between members", {
            let header = Header::new("extra", 1, b'0');
            good().raw(&header.sum()).raw(&[1; 512])
        }),
    ]
}

fn names() -> Vec<Attack> {
    let disk_as = |name: &str| others().file(name, &disk()[..8192]);
    let disk_is = |kind: u8, to: &str| others().node("disk.img", kind, to);
    let long = |name: &[u8]| {
        let header = Header::new("././@LongLink", name.len() as u64, b'L');
        others().put(header, name)
    };
    let no_name = Header::new("", 0, b'0');
    vec![
        attack(Rule::MemberPath, "./disk.img", disk_as("./disk.img")),
        attack(Rule::MemberPath, "/disk.img", disk_as("/disk.img")),
        attack(Rule::MemberPath, "a/../disk.img", disk_as("a/../disk.img")),
        attack(Rule::MemberPath, "disk.img/", disk_as("disk.img/")),
        attack(
            Rule::MemberPath,
            "a path in a PAX header",
            others().pax(&[("path", "./disk.img")]).file("x", &disk()),
        ),
        attack(
            Rule::MemberPath,
            "a long name",
            long(b"../disk.img\0").file("x", &disk()),
        ),
        attack(
            Rule::MemberKind,
            "a symbolic link",
            disk_is(b'2', "/etc/passwd"),
        ),
        attack(
            Rule::MemberKind,
            "a hard link outside",
            disk_is(b'1', "/etc/passwd"),
        ),
        attack(
            Rule::MemberKind,
            "a hard link inside",
            disk_is(b'1', "layer.qcow2"),
        ),
        attack(Rule::MemberKind, "a block device", disk_is(b'4', "")),
        attack(Rule::MemberKind, "a character device", disk_is(b'3', "")),
        attack(Rule::MemberKind, "a named pipe", disk_is(b'6', "")),
        attack(
            Rule::MemberKind,
            "a folder",
            others().node("disk.img/", b'5', ""),
        ),
        attack(
            Rule::MemberKind,
            "a member of several tapes",
            disk_is(b'M', ""),
        ),
        attack(
            Rule::MemberKind,
            "a link, then a file",
            others()
                .node("disk.img", b'2', "x")
                .file("disk.img", &disk()),
        ),
        attack(
            Rule::DuplicateMember,
            "two disks",
            good().file("disk.img", &disk()),
        ),
        attack(
            Rule::DuplicateMember,
            "two machines",
            good().file("machine.json", MACHINE),
        ),
        attack(
            Rule::DuplicateMember,
            "by another name",
            good().pax(&[("path", "layer.qcow2")]).file("x", &layer()),
        ),
        attack(Rule::MissingMember, "nothing", Tar::default()),
        attack(Rule::MissingMember, "no disk", others()),
        attack(
            Rule::MissingMember,
            "a disk in a folder",
            disk_as("image/disk.img"),
        ),
        attack(Rule::MissingMember, "another case", disk_as("Disk.img")),
        attack(
            Rule::MissingMember,
            "no layer",
            Tar::default()
                .file("disk.img", &disk())
                .file("machine.json", MACHINE),
        ),
        attack(
            Rule::MissingMember,
            "no machine",
            Tar::default()
                .file("disk.img", &disk())
                .file("layer.qcow2", &layer()),
        ),
        attack(Rule::HeaderName, "no name", good().put(no_name, b"")),
        attack(
            Rule::HeaderName,
            "a long name without its end",
            long(b"disk.img").file("x", &disk()),
        ),
        attack(
            Rule::HeaderName,
            "a long name with two ends",
            long(b"disk.img\0x\0").file("x", &disk()),
        ),
        attack(
            Rule::HeaderName,
            "two long names",
            long(b"x\0")
                .put(Header::new("l", 2, b'L'), b"y\0")
                .file("x", b""),
        ),
        attack(
            Rule::HeaderName,
            "a long name and a PAX path",
            long(b"disk.img\0").pax(&[("path", "x")]).file("x", &disk()),
        ),
        attack(
            Rule::HeaderName,
            "a PAX path and a long name",
            others()
                .pax(&[("path", "x")])
                .put(Header::new("l", 9, b'L'), b"disk.img\0")
                .file("x", &disk()),
        ),
    ]
}

fn pax() -> Vec<Attack> {
    let header = |text: &[u8]| {
        good()
            .put(Header::new("p", text.len() as u64, b'x'), text)
            .file("extra", b"")
    };
    let global = |records: &[(&str, &str)]| {
        let text: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        Tar::default()
            .put(Header::new("g", text.len() as u64, b'g'), &text)
            .raw(&good().cut())
    };
    let many: Vec<(String, String)> = (0..1100)
        .map(|n| (format!("a{n}"), "b".to_owned()))
        .collect();
    let many: Vec<_> = many.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
    let large = "x".repeat(1 << 20);
    vec![
        attack(Rule::PaxMalformed, "no length", header(b"path=x\n")),
        attack(
            Rule::PaxMalformed,
            "too short a length",
            header(b"1 path=x\n"),
        ),
        attack(
            Rule::PaxMalformed,
            "too long a length",
            header(b"99 path=x\n"),
        ),
        attack(
            Rule::PaxMalformed,
            "a huge length",
            header(b"18446744073709551615 path=x\n"),
        ),
        attack(
            Rule::PaxMalformed,
            "a length of zero",
            header(b"0 path=x\n"),
        ),
        attack(Rule::PaxMalformed, "no value", header(b"8 path1\n")),
        attack(Rule::PaxMalformed, "no end", header(b"9 path=x ")),
        attack(
            Rule::PaxMalformed,
            "a NUL in a path",
            header(b"11 path=x\0y\n"),
        ),
        attack(Rule::PaxMalformed, "no path", header(b"8 path=\n")),
        attack(
            Rule::PaxMalformed,
            "a path twice",
            header(b"9 path=x\n9 path=y\n"),
        ),
        attack(
            Rule::PaxMalformed,
            "a size that is none",
            header(b"11 size=-1\n"),
        ),
        attack(
            Rule::PaxMalformed,
            "a huge size",
            header(&record("size", &u64::MAX.to_string())),
        ),
        attack(
            Rule::PaxMalformed,
            "two for one member",
            good()
                .pax(&[("path", "x")])
                .pax(&[("path", "y")])
                .file("z", b""),
        ),
        attack(
            Rule::PaxMalformed,
            "a folder that is sparse",
            good().pax(&pax_1_0("4096")).node("x", b'5', ""),
        ),
        attack(
            Rule::PaxMalformed,
            "a size for an old sparse member",
            others()
                .pax(&[("size", "0")])
                .put(Header::sparse("disk.img", 4096, &[(0, 512)]), &[7; 512]),
        ),
        attack(
            Rule::PaxTooLarge,
            "more than a MiB",
            good().pax(&[("comment", &large)]).file("x", b""),
        ),
        attack(
            Rule::PaxTooLarge,
            "too many records",
            good().pax(&many).file("x", b""),
        ),
        attack(Rule::PaxTooLarge, "a long name", {
            let name = vec![b'x'; 65 << 10];
            good()
                .put(Header::new("l", name.len() as u64, b'L'), &name)
                .file("x", b"")
        }),
        attack(
            Rule::PaxGlobal,
            "a path for all",
            global(&[("path", "disk.img")]),
        ),
        attack(Rule::PaxGlobal, "a size for all", global(&[("size", "0")])),
        attack(
            Rule::PaxGlobal,
            "a link for all",
            global(&[("linkpath", "x")]),
        ),
        attack(Rule::PaxGlobal, "sparse for all", global(&pax_1_0("4096"))),
    ]
}

fn sparse() -> Vec<Attack> {
    let mib = 1 << 20;
    let with = |records: &[(&str, &str)]| others().pax(records).file("x", &[0; 512]);
    let endless = (0..50).fold(
        others().raw(&Header::sparse("disk.img", mib, &[]).set(482, &[1]).sum()),
        |tar, _| {
            let mut block = [0; 512];
            block[504] = 1;
            tar.raw(&block)
        },
    );
    let many: Vec<_> = (0..101).map(|n| format!("{}\n512\n", n * 8192)).collect();
    vec![
        attack(
            Rule::SparseMap,
            "overlapping",
            sparse_disk(mib, &[(0, 1024), (512, 512)]),
        ),
        attack(
            Rule::SparseMap,
            "going back",
            sparse_disk(mib, &[(8192, 512), (0, 512)]),
        ),
        attack(
            Rule::SparseMap,
            "outside",
            sparse_disk(mib, &[(mib - 512, 1024)]),
        ),
        attack(
            Rule::SparseMap,
            "an empty extent",
            sparse_disk(mib, &[(0, 0), (4096, 512)]),
        ),
        attack(Rule::SparseMap, "another size than its data", {
            let header = Header::sparse("disk.img", mib, &[(0, 1024)]).number(124, 512);
            others().put(header, &[7; 512])
        }),
        attack(
            Rule::SparseMap,
            "a map that ends in its middle",
            sparse_1_0(mib, "3\n0\n512\n", b""),
        ),
        attack(
            Rule::SparseMap,
            "a map that is none",
            sparse_1_0(mib, "one\n", b""),
        ),
        attack(
            Rule::SparseMap,
            "endless digits",
            sparse_1_0(mib, &"1".repeat(600), b""),
        ),
        attack(
            Rule::SparseMap,
            "something behind the map",
            sparse_1_0(mib, "1\n0\n512\nx", &[7; 512]),
        ),
        attack(
            Rule::SparseMap,
            "an extent outside",
            sparse_1_0(mib, "1\n1048576\n512\n", &[7; 512]),
        ),
        attack(
            Rule::SparseMap,
            "less data than the map says",
            sparse_1_0(mib, "1\n0\n1024\n", &[7; 512]),
        ),
        attack(
            Rule::SparseVersion,
            "2.0",
            with(&[
                ("GNU.sparse.major", "2"),
                ("GNU.sparse.minor", "0"),
                ("GNU.sparse.name", "disk.img"),
            ]),
        ),
        attack(
            Rule::SparseVersion,
            "0.0",
            with(&[
                ("GNU.sparse.size", "1048576"),
                ("GNU.sparse.numblocks", "1"),
                ("GNU.sparse.offset", "0"),
                ("GNU.sparse.numbytes", "512"),
            ]),
        ),
        attack(
            Rule::SparseVersion,
            "an unknown record",
            with(&[("GNU.sparse.more", "1")]),
        ),
        attack(Rule::SparseVersion, "GNU's form without GNU's header", {
            let header = Header::new("disk.img", 0, b'S').set(257, b"ustar\x0000");
            others().put(header, b"")
        }),
        attack(
            Rule::PaxMalformed,
            "half of it",
            with(&[("GNU.sparse.major", "1")]),
        ),
        attack(
            Rule::PaxMalformed,
            "fewer pairs than it says",
            with(&[
                ("GNU.sparse.size", "1048576"),
                ("GNU.sparse.numblocks", "2"),
                ("GNU.sparse.name", "disk.img"),
                ("GNU.sparse.map", "0,512"),
            ]),
        ),
        attack(
            Rule::TooManyExtents,
            "in lines",
            sparse_1_0(mib, &format!("101\n{}", many.concat()), &[7; 101 * 512]),
        ),
        attack(
            Rule::TooManyExtents,
            "a number of lines",
            sparse_1_0(mib, "99999999999\n", &[]),
        ),
        attack(Rule::TooManyExtents, "blocks without any", endless),
    ]
}

fn sizes() -> Vec<Attack> {
    let limit = budgets().disk;
    let disk_of = |size: usize| others().file("disk.img", &vec![0; size]);
    let large = vec![b' '; (1 << 20) + 1];
    let digest = format!("sha256:{}", "0".repeat(64));
    let manifest = |layer: usize| {
        format!(
            "{{\"format\": 1, \"members\": {{ \
             \"disk.img\": {{\"size\": 3145728, \"data\": 77824, \"digest\": \"{digest}\"}}, \
             \"layer.qcow2\": {{\"size\": {layer}, \"sha256\": \"{digest}\"}}, \
             \"machine.json\": {{\"size\": {}, \"sha256\": \"{digest}\"}} }} }}",
            MACHINE.len()
        )
    };
    let machine = |text: &[u8]| {
        Tar::default()
            .file("disk.img", &disk())
            .file("layer.qcow2", &layer())
            .file("machine.json", text)
    };
    vec![
        attack(Rule::DiskSize, "no disk", disk_of(0)),
        attack(Rule::DiskSize, "half a sector", disk_of(1000)),
        attack(
            Rule::DiskTooLarge,
            "one sector more",
            sparse_disk(limit + 512, &[]),
        ),
        attack(Rule::DiskTooLarge, "4 EiB", {
            let header = Header::sparse("disk.img", 0, &[]);
            others().put(header.set(483, b"\x80\0\0\0\x40\0\0\0\0\0\0\0"), b"")
        }),
        attack(
            Rule::MemberTooLarge,
            "a machine of more than a MiB",
            machine(&large),
        ),
        attack(
            Rule::MemberTooLarge,
            "such a manifest",
            good().file("manifest.json", &large),
        ),
        attack(
            Rule::SkippedTooLarge,
            "another member",
            good().file("extra", &large),
        ),
        attack(
            Rule::SkippedTooLarge,
            "several",
            good()
                .file("a", &large[..600_000])
                .file("b", &large[..600_000]),
        ),
        attack(Rule::Machine, "no JSON", machine(b"x")),
        attack(
            Rule::Machine,
            "a negative version",
            machine(b"{\"version\": -1}"),
        ),
        attack(
            Rule::Machine,
            "an unknown field",
            machine(b"{\"version\": 1, \"disk\": \"/etc/passwd\"}"),
        ),
        attack(
            Rule::Manifest,
            "no JSON",
            good().file("manifest.json", b"x"),
        ),
        attack(
            Rule::Manifest,
            "of another form",
            good().file("manifest.json", b"{\"format\": 2}"),
        ),
        attack(
            Rule::ManifestMismatch,
            "other digests",
            good().file("manifest.json", manifest(layer().len()).as_bytes()),
        ),
        attack(
            Rule::ManifestMismatch,
            "another size",
            good().file("manifest.json", manifest(5).as_bytes()),
        ),
    ]
}

#[test]
fn the_advice_says_what_is_wrong_with_a_path() {
    let err = refused(
        &zst(&others().file("./disk.img", &disk()).end()),
        &budgets(),
    );
    assert!(err.message.contains("./disk.img"), "{err}");
    assert!(err.advice.unwrap().contains("not with `.`"));
}

#[test]
fn odd_archives_that_are_fine() {
    let disk = disk();
    let text = record("comment", "made elsewhere");
    let extra = good()
        .node("a", b'2', "/etc/passwd")
        .node("dev", b'4', "")
        .file("../evil", b"x")
        .put(Header::new("g", text.len() as u64, b'g'), &text)
        .pax(&[
            ("mtime", "1.5"),
            ("path", &"long".repeat(50)),
            ("LIBARCHIVE.x", "y"),
        ])
        .file("x", b"something");
    taken(&zst(&extra.end()), &disk);
    // A PAX size and path count, whatever the header says.
    let header = Header::new("PaxHeaders/disk.img", 0, b'0').set(257, b"ustar\x0000");
    let size = disk.len().to_string();
    let tar = others()
        .pax(&[("path", "disk.img"), ("size", &size)])
        .put(header, &disk);
    taken(&zst(&tar.end()), &disk);
    // The time before there were magics.
    let tar = others().put(
        Header::new("disk.img", disk.len() as u64, 0).set(257, &[0; 8]),
        &disk,
    );
    taken(&zst(&tar.end()), &disk);
    // A map of which the last entry only says the end; and none at all.
    let mut sparse = vec![0; 3 << 20];
    sparse[4096..4608].fill(7);
    let tar = sparse_disk(3 << 20, &[(4096, 512), (3 << 20, 0)]);
    taken(&zst(&tar.end()), &sparse);
    let tar = sparse_1_0(3 << 20, "1\n4096\n512\n", &[7; 512]);
    taken(&zst(&tar.end()), &sparse);
    let map = [
        ("GNU.sparse.size", "3145728"),
        ("GNU.sparse.numblocks", "2"),
        ("GNU.sparse.name", "disk.img"),
        ("GNU.sparse.map", "4096,512,3145728,0"),
    ];
    let tar = others()
        .pax(&map)
        .file("GNUSparseFile.1/disk.img", &[7; 512]);
    taken(&zst(&tar.end()), &sparse);
    taken(&zst(&sparse_disk(3 << 20, &[]).end()), &vec![0; 3 << 20]);
}
