//! Records of sessions that outlive a process, and the storage for them.
//!
//! A killed process cannot report its nonce counters. Its successor therefore uses counters that no
//! earlier epoch can have used: each epoch has
//! [`COUNTER_LIMIT`](crate::tunnel::session::COUNTER_LIMIT) counters of its own. It accepts no
//! datagram that an earlier process may have accepted, because the highest counter of each lane is
//! stored while datagrams arrive ([`SessionSlot::set_next_counter`]).

use std::net::{IpAddr, Ipv6Addr, SocketAddr, SocketAddrV6};
use std::time::Duration;

use zeroize::Zeroizing;

use crate::keys::PublicKey;
use crate::tunnel::cipher::Cipher;
use crate::tunnel::message::Timestamp;
use crate::tunnel::noise::TransportSecrets;

/// Length of an encoded [`SavedSession`] in bytes.
pub const SAVED_LEN: usize = 184;

/// Storage for sessions that outlives the process. The data process implements it in a memfd, from
/// which its successor restores the sessions.
pub trait SessionStore: Send {
    /// Stores a session until the returned slot is dropped. Returns `None` if there is no room; the
    /// session then ends with this process.
    fn insert(&mut self, session: &SavedSession) -> Option<Box<dyn SessionSlot>>;
    /// Returns the latest wall-clock time (since 1970) that an initiation of this or an earlier
    /// process carried; zero if there was none.
    fn latest_timestamp(&self) -> Duration;
    /// Stores the wall-clock time of an initiation, before the initiation is sent.
    fn set_latest_timestamp(&mut self, timestamp: Duration);
    /// Returns the latest time (since 1970) that an accepted initiation by this public key carried,
    /// in this or an earlier process; zero if there was none.
    fn seen_timestamp(&self, key: &PublicKey) -> Duration;
    /// Stores the time of an initiation by this public key, before the initiation is answered. Zero
    /// deletes the entry.
    fn set_seen_timestamp(&mut self, key: &PublicKey, timestamp: Duration);
    /// Deletes the times of all public keys except the known ones.
    fn retain_seen_timestamps(&mut self, is_known: &dyn Fn(&PublicKey) -> bool);
}

/// Slot of one session in a [`SessionStore`]. Dropping the slot deletes the session from the
/// storage.
pub trait SessionSlot: Send + Sync {
    /// Returns one more than the highest counter accepted on a lane; 0 if none was accepted.
    fn next_counter(&self, lane: u8) -> u64;
    /// Stores one more than the highest counter accepted on a lane. Each lane has one receiving
    /// thread.
    fn set_next_counter(&self, lane: u8, next: u64);
}

/// A store without room: sessions end with the process.
pub(crate) struct NoopStore;

impl SessionStore for NoopStore {
    fn insert(&mut self, _: &SavedSession) -> Option<Box<dyn SessionSlot>> {
        None
    }

    fn latest_timestamp(&self) -> Duration {
        Duration::ZERO
    }

    fn set_latest_timestamp(&mut self, _: Duration) {}

    fn seen_timestamp(&self, _: &PublicKey) -> Duration {
        Duration::ZERO
    }

    fn set_seen_timestamp(&mut self, _: &PublicKey, _: Duration) {}

    fn retain_seen_timestamps(&mut self, _: &dyn Fn(&PublicKey) -> bool) {}
}

/// A session as it is stored: secrets, indices, and parameters of both nodes.
pub struct SavedSession {
    /// Public key of the peer that made the session.
    pub public_key: PublicKey,
    /// Process epoch of the session, 0 in the process that made it. The nonce counters of an epoch
    /// begin at `epoch << 32`.
    pub epoch: u32,
    /// Time of the handshake (monotonic clock).
    pub established: Duration,
    pub(crate) local_index: u32,
    pub(crate) remote_index: u32,
    pub(crate) cipher: Cipher,
    pub(crate) local_lanes: u8,
    pub(crate) remote_lanes: u8,
    pub(crate) initiator: bool,
    pub(crate) endpoint: Option<SocketAddr>,
    pub(crate) mtu: u16,
    pub(crate) ecn: bool,
    /// MTU that this node announced in the handshake, inner bytes; 0 in records of releases that
    /// did not store it.
    pub(crate) told_mtu: u16,
    /// Timestamp of the last initiation accepted from the peer.
    pub(crate) timestamp: Timestamp,
    pub(crate) secrets: TransportSecrets,
}

impl SavedSession {
    /// Returns the number of lanes on which the peer sends.
    pub fn remote_lanes(&self) -> u8 {
        self.remote_lanes
    }

    /// Encodes the record, secrets included. The bytes are wiped on drop.
    pub fn to_bytes(&self) -> Zeroizing<[u8; SAVED_LEN]> {
        let mut out = Zeroizing::new([0; SAVED_LEN]);
        let mut at = 0;
        let mut put = |bytes: &[u8]| {
            out[at..at + bytes.len()].copy_from_slice(bytes);
            at += bytes.len();
        };
        put(self.public_key.as_bytes());
        put(self.secrets.from_initiator.as_ref());
        put(self.secrets.from_responder.as_ref());
        put(&self.epoch.to_le_bytes());
        put(&self.local_index.to_le_bytes());
        put(&self.remote_index.to_le_bytes());
        put(&u64::try_from(self.established.as_nanos()).unwrap_or(u64::MAX).to_le_bytes());
        put(&self.timestamp.to_bytes());
        put(&[self.cipher.number(), self.local_lanes, self.remote_lanes, self.initiator.into()]);
        put(&self.mtu.to_le_bytes());
        let (family, ip, port, scope) = match self.endpoint {
            None => (0, Ipv6Addr::UNSPECIFIED, 0, 0),
            Some(SocketAddr::V4(v4)) => (4, v4.ip().to_ipv6_mapped(), v4.port(), 0),
            Some(SocketAddr::V6(v6)) => (6, *v6.ip(), v6.port(), v6.scope_id()),
        };
        put(&port.to_le_bytes());
        put(&ip.octets());
        put(&[family]);
        // Earlier releases write zero here and ignore the value.
        put(&scope.to_le_bytes());
        put(&[self.ecn.into()]);
        put(&self.told_mtu.to_le_bytes());
        out
    }

    /// Parses a record of [`SavedSession::to_bytes`]. Returns `None` if cipher, address family or
    /// role byte is unknown. The lane counts are not checked here;
    /// [`Session::new`](crate::tunnel::Session::new) checks them.
    pub fn from_bytes(bytes: &[u8; SAVED_LEN]) -> Option<Self> {
        let mut rest = bytes.as_slice();
        let public_key = PublicKey::new(read_array(&mut rest)?);
        let secrets = TransportSecrets::new(read_array(&mut rest)?, read_array(&mut rest)?);
        let [epoch, local_index, remote_index] =
            [read_array(&mut rest)?, read_array(&mut rest)?, read_array(&mut rest)?]
                .map(u32::from_le_bytes);
        let established = Duration::from_nanos(u64::from_le_bytes(read_array(&mut rest)?));
        let timestamp = Timestamp::from_bytes(read_array(&mut rest)?);
        let [cipher, local_lanes, remote_lanes, initiator] = read_array(&mut rest)?;
        let [mtu, port] = [read_array(&mut rest)?, read_array(&mut rest)?].map(u16::from_le_bytes);
        let ip = Ipv6Addr::from(read_array::<16>(&mut rest)?);
        let family = read_array(&mut rest)?;
        let scope = u32::from_le_bytes(read_array(&mut rest)?);
        let endpoint = match family {
            [0] => None,
            [4] => Some(SocketAddr::new(IpAddr::V4(ip.to_ipv4_mapped()?), port)),
            [6] => Some(SocketAddrV6::new(ip, port, 0, scope).into()),
            _ => return None,
        };
        let [ecn] = read_array(&mut rest)?;
        let told_mtu = u16::from_le_bytes(read_array(&mut rest)?);
        let cipher = Cipher::from_number(cipher)?;
        let initiator = match initiator {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self {
            public_key,
            epoch,
            established,
            local_index,
            remote_index,
            cipher,
            local_lanes,
            remote_lanes,
            initiator,
            endpoint,
            mtu,
            ecn: ecn == 1,
            told_mtu,
            timestamp,
            secrets,
        })
    }
}

/// Removes the first `N` bytes of `rest` and returns them. Returns `None` if `rest` is shorter.
fn read_array<const N: usize>(rest: &mut &[u8]) -> Option<[u8; N]> {
    let (head, tail) = rest.split_first_chunk()?;
    *rest = tail;
    Some(*head)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    pub(crate) fn saved(endpoint: Option<&str>) -> SavedSession {
        SavedSession {
            public_key: PublicKey::new([7; 32]),
            epoch: 3,
            established: Duration::from_nanos(u64::MAX / 3),
            local_index: 0x0102_0304,
            remote_index: 0x0506_0708,
            cipher: Cipher::ChaCha20Poly1305,
            local_lanes: 2,
            remote_lanes: 64,
            initiator: true,
            endpoint: endpoint.map(|text| text.parse().unwrap()),
            mtu: 8940,
            ecn: true,
            told_mtu: 1360,
            timestamp: Timestamp::new(Duration::from_secs(5)),
            secrets: TransportSecrets::new([1; 32], [2; 32]),
        }
    }

    #[test]
    fn saved_session_round_trips_through_bytes() {
        let addresses = ["192.0.2.1:51900", "[2001:db8::1]:4000", "[fe80::1%7]:51900"];
        for endpoint in addresses.into_iter().map(Some).chain([None]) {
            let bytes = saved(endpoint).to_bytes();
            let again = SavedSession::from_bytes(&bytes).unwrap();
            assert_eq!(again.to_bytes(), bytes);
            assert_eq!((again.epoch, again.mtu, again.initiator, again.ecn), (3, 8940, true, true));
            assert_eq!(again.told_mtu, 1360);
            assert_eq!(again.endpoint, endpoint.map(|text| text.parse().unwrap()));
            assert_eq!(again.established, saved(None).established);
        }
    }

    proptest! {
        #[test]
        fn random_bytes_do_not_panic(bytes in prop::collection::vec(any::<u8>(), SAVED_LEN)) {
            let bytes: [u8; SAVED_LEN] = bytes.try_into().unwrap();
            if let Some(read) = SavedSession::from_bytes(&bytes) {
                prop_assert!(SavedSession::from_bytes(&read.to_bytes()).is_some());
            }
        }
    }
}
