//! A tar archive in memory, bounded, into which no private key comes.

use std::io;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::control::identity;

/// The longest entry in bytes; of what is longer the end is kept, which in logs is the latest.
pub(super) const ENTRY: usize = 4 << 20;
/// All entries in bytes, before compression.
const TOTAL: usize = 48 << 20;
/// Of these for the list of what is in it, which has to be there when it is full.
const LIST: usize = 1 << 20;
/// Stands where a secret was.
const REMOVED: &[u8] = b"[private key removed]";

/// What is in the archive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) bytes: usize,
    /// Why it is not whole, or not there.
    pub(super) note: Option<String>,
}

pub(super) struct Archive {
    root: String,
    /// Seconds since 1970.
    time: u64,
    tar: tar::Builder<GzEncoder<Vec<u8>>>,
    secrets: Vec<Zeroizing<Vec<u8>>>,
    entries: Vec<Entry>,
    total: usize,
}

impl Archive {
    /// `keys` are files of private keys: wherever what is in them turns up, it is removed.
    pub(super) fn new(root: &str, time: u64, keys: &[PathBuf]) -> Self {
        let encoder = GzEncoder::new(Vec::new(), Compression::default());
        Self {
            root: root.to_owned(),
            time,
            tar: tar::Builder::new(encoder),
            secrets: keys.iter().flat_map(|key| secrets(key)).collect(),
            entries: Vec::new(),
            total: 0,
        }
    }

    pub(super) fn entries(&self) -> Vec<Entry> {
        self.entries.clone()
    }

    /// Adds an entry, as much of it as there is room for.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) {
        match ENTRY.min(TOTAL - LIST - self.total) {
            0 => self.missing(name, "the archive is full"),
            room => self.put(name, content, room),
        }
    }

    fn put(&mut self, name: &str, content: &[u8], room: usize) {
        let mut notes = Vec::new();
        let mut kept = Zeroizing::new(content.to_vec());
        for secret in &self.secrets {
            if remove(&mut kept, secret) {
                notes.push("a private key was removed");
            }
        }
        if kept.len() > room {
            notes.push("only the end");
            let excess = kept.len() - room;
            kept.drain(..excess);
        }
        self.total += kept.len();
        let mut header = tar::Header::new_gnu();
        header.set_size(kept.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        header.set_cksum();
        // Memory is all that it is written to, and names are short.
        let path = format!("{}/{name}", self.root);
        if let Err(error) = self.tar.append_data(&mut header, path, &kept[..]) {
            return self.missing(name, &error.to_string());
        }
        let note = (!notes.is_empty()).then(|| notes.join(", "));
        self.entries.push(Entry { name: name.to_owned(), bytes: kept.len(), note });
    }

    /// Notes what could not be had.
    pub(super) fn missing(&mut self, name: &str, why: &str) {
        let note = Some(why.trim().to_owned());
        self.entries.push(Entry { name: name.to_owned(), bytes: 0, note });
    }

    /// The archive's bytes, with the list of what is in it.
    pub(super) fn finish(mut self) -> io::Result<Vec<u8>> {
        let line = |entry: &Entry| {
            let note = entry.note.as_deref().unwrap_or_default();
            format!("{:>9} {} {note}\n", entry.bytes, entry.name)
        };
        let list: String = self.entries.iter().map(line).collect();
        self.put("contents.txt", list.as_bytes(), LIST);
        self.tar.into_inner()?.finish()
    }
}

/// Every form in which the private key of a file could stand in a text.
fn secrets(key: &Path) -> Vec<Zeroizing<Vec<u8>>> {
    // A key that cannot be read here cannot come into what is read here either.
    let Ok(Some(key)) = identity::load(key) else { return Vec::new() };
    let base64 = key.to_base64();
    let hex = |digit: fn(&u8) -> String| -> Vec<u8> {
        key.as_bytes().iter().map(digit).collect::<String>().into_bytes()
    };
    [
        base64.trim_end_matches('=').as_bytes().to_vec(),
        base64.trim_end_matches('=').replace('+', "-").replace('/', "_").into_bytes(),
        hex(|byte| format!("{byte:02x}")),
        hex(|byte| format!("{byte:02X}")),
        key.as_bytes().to_vec(),
    ]
    .map(Zeroizing::new)
    .into()
}

/// Replaces every occurrence of `secret`; says whether there was one.
fn remove(content: &mut Zeroizing<Vec<u8>>, secret: &[u8]) -> bool {
    let mut found = false;
    let mut from = 0;
    while let Some(at) = content[from..].windows(secret.len()).position(|part| part == secret) {
        found = true;
        let at = from + at;
        content.splice(at..at + secret.len(), REMOVED.iter().copied());
        from = at + REMOVED.len();
    }
    found
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Read;

    use flate2::read::GzDecoder;

    use super::*;
    use skein_ipc::keys::PrivateKey;

    fn unpack(packed: &[u8]) -> Vec<(String, Vec<u8>)> {
        let mut archive = tar::Archive::new(GzDecoder::new(packed));
        let entries = archive.entries().unwrap().map(|entry| {
            let mut entry = entry.unwrap();
            let mut content = Vec::new();
            entry.read_to_end(&mut content).unwrap();
            (entry.path().unwrap().display().to_string(), content)
        });
        entries.collect()
    }

    #[test]
    fn no_form_of_the_private_key_gets_in() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key");
        let key = PrivateKey::generate().unwrap();
        identity::store(&path, &key).unwrap();
        let hex: String = key.as_bytes().iter().map(|byte| format!("{byte:02x}")).collect();
        let mut archive = Archive::new("dump", 0, std::slice::from_ref(&path));
        let mut text = format!("a {} b {hex} c {} d ", *key.to_base64(), hex.to_uppercase());
        text += &hex;
        let mut content = text.into_bytes();
        content.extend(key.as_bytes());
        archive.add("log", &content);
        archive.add("clean", b"nothing");
        assert!(archive.entries()[0].note.is_some() && archive.entries()[1].note.is_none());
        let all = unpack(&archive.finish().unwrap());
        let found = |bytes: &[u8]| {
            all.iter().any(|(_, content)| content.windows(bytes.len()).any(|part| part == bytes))
        };
        assert!(!found(key.as_bytes()) && !found(hex.as_bytes()));
        assert!(!found(hex.to_uppercase().as_bytes()));
        assert!(!found(key.to_base64().trim_end_matches('=').as_bytes()));
        assert!(found(b"a [private key removed]= b [private key removed] c"));
        assert_eq!(all[1], ("dump/clean".to_owned(), b"nothing".to_vec()));
    }

    #[test]
    fn entries_and_the_whole_are_bounded() {
        let mut archive = Archive::new("dump", 0, &[]);
        let mut long = vec![b'x'; ENTRY + 100];
        long.extend(b"the end");
        for n in 0..TOTAL / ENTRY + 2 {
            archive.add(&n.to_string(), &long);
        }
        let entries = archive.entries();
        assert_eq!(entries[0].bytes, ENTRY);
        assert_eq!(entries[0].note.as_deref(), Some("only the end"));
        assert_eq!(entries.last().unwrap().note.as_deref(), Some("the archive is full"));
        assert_eq!(entries.iter().map(|entry| entry.bytes).sum::<usize>(), TOTAL - LIST);
        let all = unpack(&archive.finish().unwrap());
        assert!(all[0].1.ends_with(b"the end"));
        let (name, list) = all.last().unwrap();
        assert_eq!(name, "dump/contents.txt");
        assert_eq!(String::from_utf8_lossy(list).lines().count(), entries.len());
    }
}
