//! Names of kernel objects, derived from their content.

use std::fmt::{Debug, Write as _};

use aws_lc_rs::digest;

/// Bytes of the digest that become part of a name. With 96 bits, no other content can be found for
/// the name of a given content.
const DIGEST_BYTES: usize = 12;

/// Returns `prefix` and a digest of `content`: of its debug text, which quotes all strings and is
/// therefore different for different contents.
pub(crate) fn of_content(prefix: &str, content: &impl Debug) -> String {
    let digest = digest::digest(&digest::SHA256, format!("{content:?}").as_bytes());
    let mut name = prefix.to_owned();
    for byte in digest.as_ref().iter().take(DIGEST_BYTES) {
        let _ = write!(name, "{byte:02x}");
    }
    name
}
