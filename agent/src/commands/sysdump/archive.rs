//! Tar archive in memory with a bounded size. Private keys are removed from its content.

use std::io;
use std::path::{Path, PathBuf};

use flate2::Compression;
use flate2::write::GzEncoder;
use serde::Serialize;
use zeroize::Zeroizing;

use crate::control::identity;

/// Maximum size of an entry in bytes. Of longer content the end is kept, which is the latest part
/// of a log.
pub(super) const MAX_ENTRY: usize = 4 << 20;
/// Maximum size of all entries in bytes, before compression.
const MAX_TOTAL: usize = 48 << 20;
/// Part of [`MAX_TOTAL`] that is reserved for `contents.txt`, in bytes.
const CONTENTS_RESERVE: usize = 1 << 20;
/// Replacement for a secret.
const REDACTED: &[u8] = b"[private key removed]";

/// Line of `contents.txt`: an entry, or content that is not available.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(super) struct Entry {
    pub(super) name: String,
    pub(super) bytes: usize,
    /// Reason that the entry is incomplete or missing.
    pub(super) note: Option<String>,
}

pub(super) struct Archive {
    root: String,
    /// Modification time of all entries, seconds since 1970.
    time: u64,
    tar: tar::Builder<GzEncoder<Vec<u8>>>,
    secrets: Vec<Zeroizing<Vec<u8>>>,
    entries: Vec<Entry>,
    total: usize,
}

impl Archive {
    /// Creates an empty archive with the directory `root`. The private keys in the files `keys` are
    /// removed from all entries.
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

    /// Adds an entry. Content that exceeds the bounds is cut at its start.
    pub(super) fn add(&mut self, name: &str, content: &[u8]) {
        match MAX_ENTRY.min(MAX_TOTAL - CONTENTS_RESERVE - self.total) {
            0 => self.missing(name, "the archive is full"),
            room => self.put(name, content, room),
        }
    }

    fn put(&mut self, name: &str, content: &[u8], room: usize) {
        let mut notes = Vec::new();
        let mut kept = Zeroizing::new(content.to_vec());
        for secret in &self.secrets {
            if redact(&mut kept, secret) {
                notes.push("a private key was removed");
            }
        }
        if kept.len() > room {
            notes.push("truncated: only the end");
            let excess = kept.len() - room;
            kept.drain(..excess);
        }
        self.total += kept.len();
        let mut header = tar::Header::new_gnu();
        header.set_size(kept.len() as u64);
        header.set_mode(0o600);
        header.set_mtime(self.time);
        header.set_cksum();
        // Writing to memory does not fail, and names are short.
        let path = format!("{}/{name}", self.root);
        if let Err(error) = self.tar.append_data(&mut header, path, &kept[..]) {
            return self.missing(name, &error.to_string());
        }
        let note = (!notes.is_empty()).then(|| notes.join(", "));
        self.entries.push(Entry { name: name.to_owned(), bytes: kept.len(), note });
    }

    /// Records in `contents.txt` that content is not available.
    pub(super) fn missing(&mut self, name: &str, why: &str) {
        let note = Some(why.trim().to_owned());
        self.entries.push(Entry { name: name.to_owned(), bytes: 0, note });
    }

    /// Adds `contents.txt` and returns the compressed archive.
    pub(super) fn finish(mut self) -> io::Result<Vec<u8>> {
        let line = |entry: &Entry| {
            let note = entry.note.as_deref().unwrap_or_default();
            format!("{:>9} {} {note}\n", entry.bytes, entry.name)
        };
        let list: String = self.entries.iter().map(line).collect();
        self.put("contents.txt", list.as_bytes(), CONTENTS_RESERVE);
        self.tar.into_inner()?.finish()
    }
}

/// Returns every encoding in which the private key of a file can occur in content: base64,
/// base64url, hexadecimal and raw.
fn secrets(key: &Path) -> Vec<Zeroizing<Vec<u8>>> {
    // If this process cannot read the key, the content that it collects cannot contain the key.
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

/// Replaces every occurrence of `secret` and returns whether there was one.
fn redact(content: &mut Zeroizing<Vec<u8>>, secret: &[u8]) -> bool {
    let mut found = false;
    let mut from = 0;
    while let Some(at) = content[from..].windows(secret.len()).position(|part| part == secret) {
        found = true;
        let at = from + at;
        content.splice(at..at + secret.len(), REDACTED.iter().copied());
        from = at + REDACTED.len();
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
    fn every_encoding_of_private_key_is_removed() {
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
    fn entry_size_and_total_size_are_bounded() {
        let mut archive = Archive::new("dump", 0, &[]);
        let mut long = vec![b'x'; MAX_ENTRY + 100];
        long.extend(b"the end");
        for n in 0..MAX_TOTAL / MAX_ENTRY + 2 {
            archive.add(&n.to_string(), &long);
        }
        let entries = archive.entries();
        assert_eq!(entries[0].bytes, MAX_ENTRY);
        assert_eq!(entries[0].note.as_deref(), Some("truncated: only the end"));
        assert_eq!(entries.last().unwrap().note.as_deref(), Some("the archive is full"));
        assert_eq!(
            entries.iter().map(|entry| entry.bytes).sum::<usize>(),
            MAX_TOTAL - CONTENTS_RESERVE
        );
        let all = unpack(&archive.finish().unwrap());
        assert!(all[0].1.ends_with(b"the end"));
        let (name, list) = all.last().unwrap();
        assert_eq!(name, "dump/contents.txt");
        assert_eq!(String::from_utf8_lossy(list).lines().count(), entries.len());
    }
}
