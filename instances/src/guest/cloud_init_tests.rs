//! What is taken, what is refused, and that nothing is changed.

use super::*;
use proptest::prelude::*;
use std::io::Write;

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut packer = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    packer.write_all(bytes).unwrap();
    packer.finish().unwrap()
}

const MIME: &str = "Content-Type: multipart/mixed; boundary=\"XX\"\nMIME-Version: 1.0\n\n\
--XX\nContent-Type: text/cloud-config; charset=\"us-ascii\"\n\n#cloud-config\na: 1\n\
--XX\nContent-Type: text/x-shellscript\n\n#!/bin/sh\nls\n--XX--\n";

#[test]
fn what_is_taken_stays_as_it_is() {
    for (text, kind) in [
        ("#cloud-config\n", Kind::CloudConfig),
        ("#cloud-config\n{}\n", Kind::CloudConfig),
        ("#cloud-config\r\nruncmd:\r\n  - ls\r\n", Kind::CloudConfig),
        ("\n\n#Cloud-Config\na: 1", Kind::CloudConfig),
        (
            "#cloud-config\n# a: [comment\na: !!binary aGk=\n",
            Kind::CloudConfig,
        ),
        ("#cloud-config\na: 1\na: 2\n", Kind::CloudConfig),
        (
            "#cloud-config\nx: &a {k: v}\ny: {<<: *a}\n1: 2\nno: yes\nm: 0644\n",
            Kind::CloudConfig,
        ),
        (
            "#cloud-config\nwrite_files:\n- content: |\n    x\n  path: /a\n",
            Kind::CloudConfig,
        ),
        (
            "#cloud-config-archive\n- type: text/cloud-config\n  content: 'a: 1'\n",
            Kind::CloudConfigArchive,
        ),
        (
            "#cloud-config-jsonp\n[{\"op\": \"add\", \"path\": \"/a\", \"value\": 1}]\n",
            Kind::JsonPatch,
        ),
        ("#!/bin/sh\n}{ not yaml: [\n", Kind::Script),
        ("#! /usr/bin/env python3\nprint('\u{e4}')\n", Kind::Script),
        ("#include\nhttps://example.com/a\n\n# c\n", Kind::Include),
        ("#include-once\nfile:///x\n", Kind::Include),
        ("#cloud-boothook\n#!/bin/sh\n", Kind::Boothook),
        ("#part-handler\ndef x(): pass\n", Kind::PartHandler),
        (
            "## template: jinja\n#cloud-config\n{% if a %}\nx: {{ v }}\n{% endif %}\n",
            Kind::Jinja,
        ),
        (MIME, Kind::Mime),
        ("", Kind::Empty),
    ] {
        let data = check(text.into()).unwrap_or_else(|err| panic!("{text:?}: {err}"));
        assert_eq!(data.kind, kind, "{text:?}");
        assert_eq!(data.bytes, text.as_bytes(), "{text:?}");
        let packed = gzip(text.as_bytes());
        let data = check(packed.clone()).unwrap();
        assert!(data.packed && data.bytes == packed && data.kind == kind);
    }
}

#[test]
fn a_mapping_without_header_gets_one() {
    for text in [
        "runcmd: [ls]\n",
        "---\na: 1\n",
        "# my file\n\npackages:\n- vim\n",
        "{}",
    ] {
        let data = check(text.into()).unwrap();
        assert_eq!(data.bytes, format!("#cloud-config\n{text}").as_bytes());
    }
}

#[test]
fn what_is_refused_says_where_and_why() {
    for (text, why) in [
        ("hello", "no header line, and is plain text"),
        ("- a\n- b\n", "no header line, and is a list"),
        ("42", "plain text"),
        ("#cloud-config\n- a\n", "is a list, not a mapping"),
        ("#cloud-config\nhello\n", "is plain text, not a mapping"),
        ("#cloud-config\na: 1\nb: [1\nc: 2\n", "line "),
        ("#cloud-config\na: 1\n b: 2\n", "line 3"),
        ("#cloud-config\na: \"x\n", "line "),
        ("#cloud-config\na:\n\tb: 2\n", "line 3"),
        ("#cloud-config\na: *nowhere\n", "line 2"),
        ("#cloud-config\na: 1\n---\nb: 1\n", "document"),
        ("#cloud-config-archive\na: 1\n", "not a list"),
        ("#!\nls\n", "interpreter"),
        ("#include\nexample.com\n", "line 2"),
        ("## template: jinja\nx: {{ v }}\n", "template"),
        ("#cloud-config\na: \0\n", "line 2 holds a NUL"),
        ("\u{feff}#cloud-config\na: 1\n", "byte order mark"),
        (
            "MIME-Version: 1.0\nContent-Type: multipart/mixed\n\nx",
            "no boundary",
        ),
        (
            "MIME-Version: 1.0\nContent-Type: multipart/mixed; boundary=b\n\nx",
            "no parts",
        ),
        ("MIME-Version: 1.0\nno header here\n\n", "line 2"),
        (&MIME.replace("a: 1", "a: [1"), "line "),
        (&MIME.replace("--XX--", ""), "does not end"),
    ] {
        let err = check(text.into()).expect_err(text);
        assert_eq!(err.code, Code::InvalidCloudInit, "{text:?}");
        assert!(err.message.contains(why), "{text:?}: {}", err.message);
        assert!(!err.message.contains('\n'), "{text:?}: {}", err.message);
    }
    let err = check(b"#cloud-config\na: \xff\n".to_vec()).unwrap_err();
    assert!(err.message.contains("line 2 is not UTF-8"), "{err}");
}

#[test]
fn mime_faults_are_told_by_the_line_of_the_file() {
    let err = check(MIME.replace("a: 1", "a: 1\n b: 2").into()).unwrap_err();
    assert!(err.message.contains("line 9,"), "{err}");
}

#[test]
fn bombs_and_giants_are_refused_quickly() {
    let bomb = gzip(&vec![b' '; MAX_USER_DATA + 1]);
    assert!(bomb.len() < 1 << 20);
    assert!(
        check(bomb)
            .unwrap_err()
            .message
            .contains("larger than 16 MiB")
    );
    assert!(check(vec![b'#'; MAX_USER_DATA + 1]).is_err());
    let mut torn = gzip(b"#cloud-config\na: 1\n");
    torn.truncate(torn.len() - 9);
    assert!(check(torn).unwrap_err().message.contains("gzip"));
    let nested = format!("#cloud-config\na: {}", "[".repeat(100_000));
    assert!(check(nested.into()).is_err());
    let mut aliases = String::from("#cloud-config\na0: &a0 [x, x]\n");
    for n in 1..40 {
        aliases += &format!("a{n}: &a{n} [{}]\n", format!("*a{},", n - 1).repeat(9));
    }
    assert!(check(aliases.into()).is_err());
    assert!(
        check(gzip(b"a: 1\n")).is_err(),
        "a header can't be added inside"
    );
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = check(bytes);
    }

    #[test]
    fn no_text_panics(head in "(#!|#cloud-config|#include|MIME-Version: 1|## template: jinja)?", body in "\\PC{0,40}\n?[a-z:\\[\\]{}&*|> -]{0,60}") {
        let _ = check(format!("{head}\n{body}").into_bytes());
    }
}

#[test]
fn network_configurations_good_and_bad() {
    for (text, good) in [
        ("version: 2\nethernets: {}\n", true),
        ("version: 1\nconfig: []\n", true),
        ("network:\n  version: 2\n", true),
        ("ethernets: {}\n", false),
        ("version: 3\n", false),
        ("- version: 2\n", false),
        ("version: [\n", false),
        ("", false),
    ] {
        let checked = check_network(text.as_bytes().to_vec());
        assert_eq!(checked.is_ok(), good, "{text:?}");
        if let Err(err) = checked {
            assert_eq!(err.code, Code::InvalidCloudInit, "{text:?}");
        }
    }
    assert!(check_network(vec![b'#'; 70 << 10]).is_err());
}
