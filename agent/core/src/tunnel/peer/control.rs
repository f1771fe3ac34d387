//! Control messages of a peer's sessions: pings, pongs, and the path MTU discovery that they serve.

use std::net::SocketAddr;

use super::Peer;
use crate::drop::DropReason;
use crate::time::Time;
use crate::tunnel::message::Control;
use crate::tunnel::shared::Shared;
use crate::wire::header::{CONTROL_LANE, Flags, OVERHEAD};

/// Maximum plaintext of a padded ping in bytes: the size of jumbo frames.
const MAX_PROBE: u16 = 9000;

impl Peer {
    /// Handles a change of this node's MTU. [`Self::tick`] starts the handshake that announces it
    /// to the peer.
    pub(crate) fn on_own_mtu(&mut self, now: Time, shared: &mut Shared) {
        if self.current.is_some() {
            self.start_path_mtu_discovery(now, shared);
        }
    }

    /// Starts or continues path MTU discovery after a handshake or a change of address or MTU.
    pub(super) fn start_path_mtu_discovery(&mut self, now: Time, shared: &mut Shared) {
        let theirs = self.view.mtu.unwrap_or(shared.params.mtu);
        let most = theirs.min(shared.params.mtu).min(MAX_PROBE);
        let elsewhere = self.path_to != self.view.endpoint;
        self.path_to = self.view.endpoint;
        self.path.on_session(now.mono, most, elsewhere);
        self.publish_path_mtu(shared);
    }

    pub(super) fn probe_path(&mut self, now: Time, shared: &mut Shared) {
        let (id, ping) = self.live.probe(now.mono);
        if let Some(size) = self.path.poll_probe(now.mono, id) {
            if self.path.needs_reference() {
                // The short ping tells a loss that depends on the size from other losses.
                let (id, short) = self.live.ping(now.mono);
                self.path.on_reference_sent(id);
                self.send_control(short, shared);
            }
            self.send_padded(ping, usize::from(size), shared);
        }
        self.publish_path_mtu(shared);
    }

    /// Handles a datagram with a plaintext of `size` bytes that this host's route to `destination`
    /// refused. Returns whether the path MTU became smaller
    /// ([`PathMtu::on_send_too_big`](crate::tunnel::path_mtu::PathMtu::on_send_too_big)).
    pub(crate) fn on_send_too_big(
        &mut self,
        now: Time,
        destination: SocketAddr,
        size: u16,
        fits: Option<u16>,
        shared: &mut Shared,
    ) -> bool {
        let narrower =
            self.path_to == Some(destination) && self.path.on_send_too_big(now.mono, size, fits);
        self.publish_path_mtu(shared);
        narrower
    }

    pub(super) fn publish_path_mtu(&mut self, shared: &mut Shared) {
        // A peer accepts no packets longer than its own MTU, whatever the path carries.
        let theirs = self.view.mtu.filter(|mtu| *mtu < shared.params.mtu);
        let found = self.path.reduced_mtu().or(theirs);
        if self.view.path_mtu != found {
            self.view.path_mtu = found;
            shared.changed = true;
        }
    }

    /// Sends a ping for liveness.
    pub(super) fn ping(&mut self, now: Time, shared: &mut Shared) {
        let (_, ping) = self.live.ping(now.mono);
        self.send_control(ping, shared);
    }

    pub(super) fn send_control(&self, message: Control, shared: &mut Shared) {
        self.send_padded(message, 0, shared);
    }

    /// Sends a control message, padded with zeros to a plaintext of `length` bytes.
    pub(super) fn send_padded(&self, message: Control, length: usize, shared: &mut Shared) {
        let (Some(entry), Some(endpoint)) = (&self.current, self.view.endpoint) else { return };
        let Some(sender) = entry.session.sender(CONTROL_LANE) else { return };
        let mut plaintext = message.to_bytes();
        plaintext.resize(plaintext.len().max(length), 0);
        let mut out = vec![0; plaintext.len() + OVERHEAD];
        match sender.seal(Flags::default(), &plaintext, &mut out) {
            Ok(_) => shared.transmit(endpoint, out),
            Err(reason) => shared.drops.add(reason),
        }
    }

    /// Handles a control message in the session with this local index.
    ///
    /// # Errors
    /// [`DropReason::UnknownSession`], [`DropReason::SessionExpired`], the errors of
    /// [`Receiver::open`](crate::tunnel::session::Receiver::open), and those of the replay window.
    pub(crate) fn on_control(
        &mut self,
        now: Time,
        index: u32,
        datagram: &mut [u8],
        shared: &mut Shared,
    ) -> Result<(), DropReason> {
        let found = self.entries_mut().find(|entry| entry.session.local_index == index);
        let entry = found.ok_or(DropReason::UnknownSession)?;
        if entry.ends() <= now.mono {
            return Err(DropReason::SessionExpired);
        }
        let receiver = entry.session.receiver(CONTROL_LANE).ok_or(DropReason::WrongLane)?;
        let (header, plaintext) = receiver.open(datagram)?;
        let message = Control::read(plaintext);
        entry.window.check_and_set(header.counter)?;
        entry.session.set_next_counter(CONTROL_LANE, entry.window.next_counter());

        self.live.on_received(now.mono);
        if let Some(next) = self.next.as_ref().filter(|next| next.session.local_index == index) {
            next.session.confirm();
            self.confirm_next(now, shared);
        }
        match message {
            Some(Control::Ping { id, sent, silent }) => {
                self.live.on_ping(now.mono, silent);
                self.send_control(Control::Pong { id, sent }, shared);
            }
            Some(Control::Pong { id, sent }) => {
                self.live.on_pong(now.mono, sent);
                self.path.on_pong(id);
                self.publish_path_mtu(shared);
            }
            // Unknown control type (a newer release) or truncated message: ignored. Its
            // authenticity still proves that the peer is alive.
            None => {}
        }
        self.refresh_state(now);
        Ok(())
    }
}
