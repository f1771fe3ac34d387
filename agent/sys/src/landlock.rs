//! Landlock (landlock(7)): the data process opens, changes and executes no file, whatever system call it
//! uses, and reaches no TCP port, abstract unix socket or process. The seccomp filter
//! ([`super::seccomp`]) sees no path; this ruleset applies to every path.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetError, RulesetStatus, Scope,
};

/// Confines this thread and all threads that it starts. Descriptors that are open stay usable. The
/// kernel's own ABI decides how much of the ruleset is enforced.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if the kernel has no Landlock, or if it is disabled at boot; the
/// kernel's error otherwise.
pub fn confine() -> io::Result<()> {
    let ruleset = ruleset(CompatLevel::BestEffort).and_then(|ruleset| ruleset.create());
    let status = ruleset.and_then(|ruleset| ruleset.restrict_self()).map_err(io::Error::other)?;
    match (status.ruleset, status.landlock) {
        (_, LandlockStatus::NotImplemented) => Err(unsupported("this kernel has no Landlock")),
        (_, LandlockStatus::NotEnabled) => {
            Err(unsupported("Landlock is disabled: add it to the boot parameter lsm="))
        }
        (RulesetStatus::NotEnforced, _) => Err(io::Error::other("the ruleset is not enforced")),
        _ => Ok(()),
    }
}

/// Checks that [`confine`] would succeed, without confining anything.
///
/// # Errors
/// [`io::ErrorKind::Unsupported`] if the kernel has no Landlock or refuses a ruleset.
pub fn probe() -> io::Result<()> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let ruleset = ruleset.handle_access(AccessFs::from_all(ABI::V1));
    let created = ruleset.and_then(|ruleset| ruleset.create());
    created.map(drop).map_err(|error| unsupported(&error.to_string()))
}

/// Returns a ruleset without rules, which denies all that it handles.
fn ruleset(level: CompatLevel) -> Result<Ruleset, RulesetError> {
    Ruleset::default()
        .set_compatibility(level)
        .handle_access(AccessFs::from_all(ABI::V9))?
        .handle_access(AccessNet::BindTcp | AccessNet::ConnectTcp)?
        .scope(Scope::AbstractUnixSocket | Scope::Signal)
}

fn unsupported(text: &str) -> io::Error {
    io::Error::new(io::ErrorKind::Unsupported, text)
}
