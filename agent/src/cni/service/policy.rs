//! Pods of this node for the policy service.

use std::sync::atomic::Ordering;

use skein_cni_protocol::AttachmentId;
use skein_ipam::Lease;

use super::Service;
use crate::cni::error::Error;
use crate::cni::interface::host_name;
use crate::policy::Attachment;

impl Service {
    /// Sends all pods of this node to the policy service, once.
    ///
    /// # Errors
    /// A message if the leases cannot be read.
    pub(in crate::cni) async fn report_attachments(&self) -> Result<(), String> {
        let Some(policy) = &self.protection.policy else { return Ok(()) };
        if self.is_policy_informed.load(Ordering::Acquire) {
            return Ok(());
        }
        let leases = self.leases.list().await.map_err(|error| error.to_string())?;
        policy.set_attachments(leases.iter().map(attachment).collect()).await;
        self.is_policy_informed.store(true, Ordering::Release);
        Ok(())
    }

    /// Enforces the policies of a pod. Before an ADD creates the pod's link, so that the first
    /// packet is judged.
    ///
    /// # Errors
    /// [`Error::Policy`] if the kernel refuses the change.
    pub(super) async fn enforce_policies(&self, lease: &Lease) -> Result<(), Error> {
        let Some(policy) = &self.protection.policy else { return Ok(()) };
        policy.attach(attachment(lease)).await?;
        Ok(())
    }

    /// Removes the entries of a pod whose link is gone. A failure is logged only, because the
    /// policy service repeats the change, and entries without a link match no packet.
    pub(super) async fn end_policies(&self, id: &AttachmentId) {
        let Some(policy) = &self.protection.policy else { return };
        let interface = host_name(id);
        if let Err(error) = policy.detach(&interface).await {
            tracing::error!(interface, %error, "entries of a removed pod not deleted yet");
        }
    }
}

fn attachment(lease: &Lease) -> Attachment {
    Attachment {
        interface: host_name(&lease.id),
        pod: lease.pod.clone(),
        addresses: lease.ips().collect(),
    }
}
