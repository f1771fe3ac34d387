//! Staged interface: the TUN device before it gets its final name.
//!
//! Creation and alias are two requests, and the process can be killed between them. So that no
//! process finds a device without alias under the interface's name, the device is created under a
//! name that only this node uses, gets its alias, and is then renamed.

use std::fmt::Write;

use aws_lc_rs::digest::{SHA256, digest};
use skein_sys::tun::create_persistent;

use super::connection::{Netlink, NetlinkError};
use super::error::InterfaceError;
use super::link::{Link, LinkChange};

/// Device that becomes the overlay's interface of this node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StagedInterface {
    name: String,
    alias: String,
}

impl StagedInterface {
    /// Returns the staged device of the interface `name` with this alias.
    pub fn new(name: &str, alias: &str) -> Self {
        let digest = digest(&SHA256, format!("{name} {alias}").as_bytes());
        // An interface name has at most 15 bytes. 48 bits of the hash make a collision with another
        // program unlikely.
        let mut staged = "sk-".to_owned();
        for byte in &digest.as_ref()[..6] {
            // Writing to a `String` cannot fail.
            let _ = write!(staged, "{byte:02x}");
        }
        Self { name: staged, alias: alias.to_owned() }
    }

    /// Returns the interface name of the staged device.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Creates the device, sets its alias and renames it to `name`; returns its index. Deletes the
    /// device after an error.
    ///
    /// # Errors
    /// [`InterfaceError`] if the device cannot be created, or if the kernel refuses the alias or
    /// the name.
    pub async fn create(&self, netlink: &Netlink, name: &str) -> Result<u32, InterfaceError> {
        create_persistent(&self.name)?;
        let link = netlink.link(&self.name).await?.ok_or_else(|| NetlinkError {
            what: format!("find the new interface {}", self.name),
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

    /// Removes a staged device of a killed process. Returns whether there was one.
    ///
    /// # Errors
    /// [`InterfaceError::Foreign`] if the device under the name is not Skein's,
    /// [`InterfaceError::Netlink`] if the kernel refuses a request.
    pub async fn remove(&self, netlink: &Netlink) -> Result<bool, InterfaceError> {
        let Some(link) = netlink.link(&self.name).await? else { return Ok(false) };
        if !self.is_left_behind(&link) {
            return Err(InterfaceError::Foreign { name: self.name.clone(), found: Box::new(link) });
        }
        tracing::info!(
            interface = self.name,
            "removing the staged interface of an unfinished start"
        );
        netlink.delete_link(link.index).await?;
        Ok(true)
    }

    /// Returns whether `link`, which has the staged name, was left behind by a killed process of
    /// this node: a TUN device that is down, and whose alias is empty or that of this interface.
    fn is_left_behind(&self, link: &Link) -> bool {
        let marked = link.alias.is_empty() || link.alias == self.alias;
        link.kind.as_deref() == Some("tun") && marked && !link.up
    }
}

#[cfg(test)]
mod tests;
