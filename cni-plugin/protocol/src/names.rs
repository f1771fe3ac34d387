//! Checks of names that a runtime chooses.

use thiserror::Error;

use crate::AttachmentId;
use crate::excerpt::excerpt;

/// A sentence that names the variable, its value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct NameError(String);

/// Checks a container ID or the name of a network (`^[A-Za-z0-9][A-Za-z0-9_.-]*$`).
///
/// # Errors
/// [`NameError`], which calls the name `what`, if `name` does not match.
pub fn check_name(what: &str, name: &str) -> Result<(), NameError> {
    let mut characters = name.chars();
    let good = characters.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && characters.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if good {
        return Ok(());
    }
    let name = excerpt(name);
    Err(NameError(format!(
        "{what} is {name:?}: letters and digits are allowed, and after the first also '_', '.', '-'"
    )))
}

/// Checks the container ID and the interface name of an attachment.
///
/// # Errors
/// [`NameError`] if the container ID fails [`check_name`], or if the kernel refuses the interface
/// name.
pub fn check_id(id: &AttachmentId) -> Result<(), NameError> {
    check_name("CNI_CONTAINERID", &id.container_id)?;
    let name = id.ifname.as_str();
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if !(1..=15).contains(&name.len()) || name == "." || name == ".." || name.contains(bad) {
        let name = excerpt(name);
        return Err(NameError(format!(
            "CNI_IFNAME is {name:?}: at most 15 bytes without '/', ':' and white space are a name"
        )));
    }
    Ok(())
}
