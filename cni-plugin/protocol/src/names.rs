//! Checks of names that the container runtime chooses.

use thiserror::Error;

use crate::AttachmentId;
use crate::excerpt::excerpt;

/// Error of a name: a sentence with the variable, its value and the allowed form.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error("{0}")]
pub struct NameError(String);

/// Checks that a container ID or the name of a network matches `^[A-Za-z0-9][A-Za-z0-9_.-]*$` (CNI
/// specification 1.1.0). `what` is the name of the variable for the error.
///
/// # Errors
/// [`NameError`] if `name` does not match.
pub fn check_name(what: &str, name: &str) -> Result<(), NameError> {
    let mut characters = name.chars();
    let good = characters.next().is_some_and(|c| c.is_ascii_alphanumeric())
        && characters.all(|c| c.is_ascii_alphanumeric() || "_.-".contains(c));
    if good {
        return Ok(());
    }
    let name = excerpt(name);
    Err(NameError(format!(
        "{what} is {name:?}: use letters and digits, and after the first character also '_', '.' or \
         '-'"
    )))
}

/// Checks the container ID and the interface name of an attachment.
///
/// # Errors
/// [`NameError`] if the container ID fails [`check_name`], or if the interface name is one that the
/// kernel refuses (`dev_valid_name`): empty, longer than 15 bytes, `.` or `..`, or with `/`, `:`,
/// white space or control characters.
pub fn check_id(id: &AttachmentId) -> Result<(), NameError> {
    check_name("CNI_CONTAINERID", &id.container_id)?;
    let name = id.ifname.as_str();
    let bad = |c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control();
    if !(1..=15).contains(&name.len()) || name == "." || name == ".." || name.contains(bad) {
        let name = excerpt(name);
        return Err(NameError(format!(
            "CNI_IFNAME is {name:?}: use 1 to 15 bytes without '/', ':' and white space"
        )));
    }
    Ok(())
}
