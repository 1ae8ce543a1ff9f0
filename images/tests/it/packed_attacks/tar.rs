//! Tars byte by byte.

/// A tar in the making.
#[derive(Clone, Default)]
pub struct Tar(Vec<u8>);

/// A header in the making; GNU's.
#[derive(Clone)]
pub struct Header(pub [u8; 512]);

impl Header {
    pub fn new(name: &str, size: u64, kind: u8) -> Self {
        let mut block = [0; 512];
        block[..name.len()].copy_from_slice(name.as_bytes());
        block[100..108].copy_from_slice(b"0000644\0");
        block[108..116].copy_from_slice(b"0000000\0");
        block[116..124].copy_from_slice(b"0000000\0");
        block[124..136].copy_from_slice(format!("{size:011o}\0").as_bytes());
        block[136..148].copy_from_slice(b"00000000000\0");
        block[156] = kind;
        block[257..265].copy_from_slice(b"ustar  \0");
        Self(block)
    }

    /// Changes bytes; the checksum will be right.
    pub fn set(mut self, at: usize, bytes: &[u8]) -> Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub fn number(self, at: usize, value: u64) -> Self {
        self.set(at, format!("{value:011o}\0").as_bytes())
    }

    /// GNU's old sparse form.
    pub fn sparse(name: &str, size: u64, extents: &[(u64, u64)]) -> Self {
        let stored = extents.iter().map(|(_, len)| len).sum();
        let mut header = Self::new(name, stored, b'S').number(483, size);
        for (n, (offset, len)) in extents.iter().take(4).enumerate() {
            header = header
                .number(386 + n * 24, *offset)
                .number(398 + n * 24, *len);
        }
        header
    }

    pub fn sum(mut self) -> [u8; 512] {
        self.0[148..156].fill(b' ');
        let sum: u64 = self.0.iter().map(|byte| u64::from(*byte)).sum();
        self.0[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        self.0
    }
}

impl Tar {
    /// Bytes as they are.
    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    /// A header, and data in whole blocks behind it.
    pub fn put(self, header: Header, data: &[u8]) -> Self {
        let mut padded = data.to_vec();
        padded.resize(data.len().next_multiple_of(512), 0);
        self.raw(&header.sum()).raw(&padded)
    }

    pub fn file(self, name: &str, data: &[u8]) -> Self {
        self.put(Header::new(name, data.len() as u64, b'0'), data)
    }

    /// A link, a device or a folder.
    pub fn node(self, name: &str, kind: u8, to: &str) -> Self {
        self.put(Header::new(name, 0, kind).set(157, to.as_bytes()), b"")
    }

    /// A PAX header for the next member.
    pub fn pax(self, records: &[(&str, &str)]) -> Self {
        let text: Vec<u8> = records
            .iter()
            .flat_map(|(key, value)| record(key, value))
            .collect();
        self.put(Header::new("PaxHeaders/x", text.len() as u64, b'x'), &text)
    }

    /// The bytes so far.
    pub fn cut(self) -> Vec<u8> {
        self.0
    }

    /// With the end that a tar has.
    pub fn end(self) -> Vec<u8> {
        self.raw(&[0; 1024]).0
    }
}

/// A record, whose length counts itself.
pub fn record(key: &str, value: &str) -> Vec<u8> {
    let rest = format!(" {key}={value}\n");
    let mut len = rest.len() + 1;
    while len.to_string().len() + rest.len() != len {
        len += 1;
    }
    format!("{len}{rest}").into_bytes()
}
