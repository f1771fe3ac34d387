//! Detection of statically linked programs, by the program headers of their ELF files (elf(5)).

use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use anyhow::{Context as _, Result, ensure};

/// Type of the program header that names the dynamic loader.
const PT_INTERP: u32 = 3;

/// Length of the ELF header of a 64-bit program.
const HEADER_LEN: usize = 64;

/// Returns whether a program runs without a dynamic loader, that is, without libraries.
///
/// # Errors
///
/// Returns an error if the file cannot be read, or if it is not a 64-bit little-endian ELF file.
pub fn is_static(program: &Path) -> Result<bool> {
    let file = File::open(program).with_context(|| program.display().to_string())?;
    let mut header = [0; HEADER_LEN];
    file.read_exact_at(&mut header, 0).context("too short for a program")?;
    ensure!(header.starts_with(b"\x7fELF\x02\x01"), "not a 64-bit ELF file");
    let number = |at: usize, len: usize| {
        header[at..at + len].iter().rev().fold(0, |sum, byte| sum << 8 | u64::from(*byte))
    };
    let (offset, entry_len, entries) = (number(32, 8), number(54, 2), number(56, 2));
    for entry in 0..entries {
        let mut kind = [0; 4];
        let at = offset.checked_add(entry * entry_len).context("a wrong program header")?;
        file.read_exact_at(&mut kind, at).context("a truncated program header")?;
        if u32::from_le_bytes(kind) == PT_INTERP {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The header of a program without program headers.
#[cfg(test)]
pub(crate) const STATIC_EXAMPLE: [u8; HEADER_LEN] = {
    let mut header = [0; HEADER_LEN];
    header[0] = 0x7f;
    header[1] = b'E';
    header[2] = b'L';
    header[3] = b'F';
    header[4] = 2;
    header[5] = 1;
    header
};

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn program_with_a_loader_is_dynamic() -> Result<()> {
        ensure!(
            !is_static(&std::env::current_exe()?)?,
            "This test program has a loader, but counts as static."
        );
        Ok(())
    }

    #[test]
    fn program_without_a_loader_is_static() -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        fs::write(file.path(), STATIC_EXAMPLE)?;
        ensure!(is_static(file.path())?, "The example has no loader, but counts as dynamic.");
        Ok(())
    }

    #[test]
    fn file_that_is_not_a_program_is_refused() -> Result<()> {
        let file = tempfile::NamedTempFile::new()?;
        for content in [&b"#!/bin/sh\n"[..], &[b'x'; 100]] {
            fs::write(file.path(), content)?;
            ensure!(is_static(file.path()).is_err(), "{content:?} was read");
        }
        Ok(())
    }
}
