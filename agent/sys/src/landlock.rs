//! Confinement of the data process by Landlock (landlock(7)): no access to files, TCP ports,
//! abstract unix sockets, or other processes by signals. The ruleset applies to each path, whatever
//! system call uses it; the seccomp filter ([`super::seccomp`]) sees numbers and pointers only.

use std::io;

use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, LandlockStatus, Ruleset,
    RulesetAttr, RulesetError, RulesetStatus, Scope,
};

/// Confines the calling thread and all threads and processes that it starts later. Open descriptors
/// stay usable. A kernel with an earlier Landlock ABI enforces a part of the ruleset.
///
/// # Errors
/// `Unsupported` if the kernel does not support Landlock, or if Landlock is disabled at boot;
/// otherwise the kernel's error.
pub fn confine() -> io::Result<()> {
    let ruleset = ruleset(CompatLevel::BestEffort).and_then(|ruleset| ruleset.create());
    let status = ruleset.and_then(|ruleset| ruleset.restrict_self()).map_err(io::Error::other)?;
    match (status.ruleset, status.landlock) {
        (_, LandlockStatus::NotImplemented) => {
            Err(unsupported("the kernel does not support Landlock"))
        }
        (_, LandlockStatus::NotEnabled) => {
            Err(unsupported("Landlock is disabled: add it to the boot parameter lsm="))
        }
        (RulesetStatus::NotEnforced, _) => Err(io::Error::other("the ruleset is not enforced")),
        _ => Ok(()),
    }
}

/// Checks that the kernel supports Landlock. The function confines no thread.
///
/// # Errors
/// `Unsupported` if the kernel does not support Landlock or refuses a ruleset.
pub fn probe() -> io::Result<()> {
    let ruleset = Ruleset::default().set_compatibility(CompatLevel::HardRequirement);
    let ruleset = ruleset.handle_access(AccessFs::from_all(ABI::V1));
    let created = ruleset.and_then(|ruleset| ruleset.create());
    created.map(drop).map_err(|error| unsupported(&error.to_string()))
}

/// Returns a ruleset without rules, which denies every access right that it handles.
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
