//! The interface before it bears its name.
//!
//! Making a device and marking it are two steps, and a process can be killed between them. So that
//! nobody ever meets an unmarked device under the interface's name, and takes it for a stranger's,
//! it is made under a name that only this node would use, marked, and renamed when it is complete.

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};
use skein_sys::tun::create_persistent;

use super::connection::{Netlink, NetlinkError};
use super::error::InterfaceError;
use super::link::{Link, LinkChange};

/// A device on its way to being the interface of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedInterface {
    name: String,
    alias: String,
}

impl StagedInterface {
    /// The one that becomes the interface `name` with this alias.
    pub fn new(name: &str, alias: &str) -> Self {
        let digest = digest(&SHA256, format!("{name} {alias}").as_bytes());
        // A name has at most 15 bytes; 48 bits are enough that nobody else has it by accident.
        let mut staged = "sk-".to_owned();
        for byte in &digest.as_ref()[..6] {
            // Writing to a String cannot fail.
            let _ = write!(staged, "{byte:02x}");
        }
        Self { name: staged, alias: alias.to_owned() }
    }

    /// Its interface name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Makes the device, marks it, and gives it its name; returns its index. Nothing stays of a
    /// device that does not get that far.
    pub async fn create(&self, netlink: &Netlink, name: &str) -> Result<u32, InterfaceError> {
        create_persistent(&self.name)?;
        let link = netlink.link(&self.name).await?.ok_or_else(|| NetlinkError {
            what: format!("find the interface {} just made", self.name),
            source: std::io::ErrorKind::NotFound.into(),
        })?;
        let alias = LinkChange { alias: Some(self.alias.clone()), ..LinkChange::default() };
        let rename = LinkChange { name: Some(name.to_owned()), ..LinkChange::default() };
        for change in [alias, rename] {
            if let Err(error) = netlink.change_link(link.index, &change).await {
                netlink.delete_link(link.index).await?;
                return Err(error.into());
            }
        }
        Ok(link.index)
    }

    /// Removes what a killed process has left; says whether there was something.
    pub async fn remove(&self, netlink: &Netlink) -> Result<bool, InterfaceError> {
        let Some(link) = netlink.link(&self.name).await? else { return Ok(false) };
        if !self.is_left(&link) {
            return Err(InterfaceError::Foreign { name: self.name.clone(), found: Box::new(link) });
        }
        tracing::info!(interface = self.name, "removing what an unfinished start has left");
        netlink.delete_link(link.index).await?;
        Ok(true)
    }

    /// Beside its name, a device of ours is known by having been touched by nobody since it was made.
    fn is_left(&self, link: &Link) -> bool {
        let marked = link.alias.is_empty() || link.alias == self.alias;
        link.kind.as_deref() == Some("tun") && marked && !link.up
    }
}

#[cfg(test)]
mod tests;
