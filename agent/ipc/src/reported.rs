//! Values of reports that have a fixed set of texts in each release. A report of another release
//! may contain other texts, so that [`Reported`] keeps an unknown text as it is.

use std::cmp::Ordering;
use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use skein_core::drop::{Direction, DropReason};
use skein_core::tunnel::{Cipher, HandshakeResult, UnreachableReason};

/// A type whose values have fixed texts in reports.
pub trait ReportValue: Copy + Eq + 'static {
    /// All values of this release.
    const VALUES: &'static [Self];

    /// Returns the text of the value in reports, which never changes.
    fn text(self) -> &'static str;
}

/// A value of a report: one that this release knows, or the text of a value of another release. The
/// JSON form is the text alone.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reported<T> {
    /// A value that this release knows.
    Known(T),
    /// Text of a value that this release does not know.
    Unknown(String),
}

impl<T: ReportValue> Reported<T> {
    /// Returns the value with this text.
    pub fn from_text(text: impl Into<String>) -> Self {
        let text = text.into();
        match T::VALUES.iter().find(|value| value.text() == text) {
            Some(value) => Self::Known(*value),
            None => Self::Unknown(text),
        }
    }

    /// Returns the text of the value in reports.
    pub fn text(&self) -> &str {
        match self {
            Self::Known(value) => value.text(),
            Self::Unknown(text) => text,
        }
    }

    /// Returns the value; `None` if this release does not know it.
    pub fn known(&self) -> Option<T> {
        match self {
            Self::Known(value) => Some(*value),
            Self::Unknown(_) => None,
        }
    }
}

impl<T> From<T> for Reported<T> {
    fn from(value: T) -> Self {
        Self::Known(value)
    }
}

impl<T: PartialEq> PartialEq<T> for Reported<T> {
    fn eq(&self, other: &T) -> bool {
        matches!(self, Self::Known(value) if value == other)
    }
}

impl<T: fmt::Display> fmt::Display for Reported<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Known(value) => value.fmt(f),
            Self::Unknown(text) => f.pad(text),
        }
    }
}

impl<T: ReportValue> Serialize for Reported<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.text())
    }
}

impl<'de, T: ReportValue> Deserialize<'de> for Reported<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(Self::from_text)
    }
}

impl ReportValue for Direction {
    const VALUES: &'static [Self] = &[Direction::Egress, Direction::Ingress];

    fn text(self) -> &'static str {
        self.label()
    }
}

impl ReportValue for HandshakeResult {
    const VALUES: &'static [Self] = HandshakeResult::ALL;

    fn text(self) -> &'static str {
        self.label()
    }
}

impl ReportValue for Cipher {
    const VALUES: &'static [Self] = &Cipher::ALL;

    fn text(self) -> &'static str {
        self.label()
    }
}

impl ReportValue for UnreachableReason {
    const VALUES: &'static [Self] = &UnreachableReason::ALL;

    fn text(self) -> &'static str {
        UnreachableReason::text(self)
    }
}

/// Direction and reason of a drop. The JSON form has the keys `direction` and `reason`. Values are
/// ordered by the texts of both.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "DropLabels", into = "DropLabels")]
pub enum DropKind {
    /// A reason that this release knows.
    Known(DropReason),
    /// A reason of another release, or a known one with another direction.
    Unknown {
        /// Text of the direction.
        direction: String,
        /// Text of the reason.
        reason: String,
    },
}

impl DropKind {
    /// Returns the kind with these texts.
    pub fn from_texts(direction: impl Into<String>, reason: impl Into<String>) -> Self {
        let (direction, reason) = (direction.into(), reason.into());
        match DropReason::from_labels(&direction, &reason) {
            Some(known) => Self::Known(known),
            None => Self::Unknown { direction, reason },
        }
    }

    /// Returns the text of the direction.
    pub fn direction(&self) -> &str {
        match self {
            Self::Known(reason) => reason.direction().label(),
            Self::Unknown { direction, .. } => direction,
        }
    }

    /// Returns the text of the reason.
    pub fn reason(&self) -> &str {
        match self {
            Self::Known(reason) => reason.label(),
            Self::Unknown { reason, .. } => reason,
        }
    }

    /// Returns the reason; `None` if this release does not know it.
    pub fn known(&self) -> Option<DropReason> {
        match self {
            Self::Known(reason) => Some(*reason),
            Self::Unknown { .. } => None,
        }
    }
}

impl From<DropReason> for DropKind {
    fn from(reason: DropReason) -> Self {
        Self::Known(reason)
    }
}

impl Ord for DropKind {
    fn cmp(&self, other: &Self) -> Ordering {
        let by_direction = self.direction().cmp(other.direction());
        by_direction.then_with(|| self.reason().cmp(other.reason()))
    }
}

impl PartialOrd for DropKind {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

/// JSON form of a [`DropKind`].
#[derive(Serialize, Deserialize)]
struct DropLabels {
    direction: String,
    reason: String,
}

impl From<DropLabels> for DropKind {
    fn from(labels: DropLabels) -> Self {
        Self::from_texts(labels.direction, labels.reason)
    }
}

impl From<DropKind> for DropLabels {
    fn from(kind: DropKind) -> Self {
        Self { direction: kind.direction().to_owned(), reason: kind.reason().to_owned() }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::capture::{CapturedPacket, PacketKind};
    use crate::{
        CapabilityName, CapabilityState, ConfinementState, Mechanism, PeerState, Report, Response,
    };

    /// Asserts that every value has the text of `texts` as its JSON form, in their order.
    fn assert_texts<T: ReportValue + std::fmt::Debug>(texts: &[&str]) {
        let found: Vec<_> = T::VALUES.iter().map(|value| value.text()).collect();
        assert_eq!(found, texts);
        for value in T::VALUES {
            let known = Reported::from(*value);
            let document = serde_json::to_value(&known).unwrap();
            assert_eq!(document, value.text());
            assert_eq!(serde_json::from_value::<Reported<T>>(document).unwrap(), known);
        }
    }

    #[test]
    fn values_keep_their_texts() {
        assert_texts::<CapabilityName>(&[
            "tun_uso",
            "tun_tso",
            "tun_checksum",
            "udp_gso",
            "udp_gro",
            "udp_ecn",
            "reuseport_steering",
        ]);
        assert_texts::<CapabilityState>(&["on", "degraded", "unsupported", "forced_off"]);
        assert_texts::<Mechanism>(&["landlock", "seccomp"]);
        assert_texts::<ConfinementState>(&["on", "unsupported", "failed", "forced_off"]);
        assert_texts::<PeerState>(&["idle", "connecting", "established", "unreachable"]);
        assert_texts::<Direction>(&["egress", "ingress"]);
        assert_texts::<Cipher>(&["aes256-gcm", "chacha20-poly1305"]);
        assert_texts::<UnreachableReason>(&[
            "no usable endpoint in its record",
            "handshakes get no answer",
            "nothing comes back",
            "it hears nothing from this node",
            "no cipher in common",
        ]);
        assert_texts::<HandshakeResult>(&[
            "initiated",
            "completed_initiator",
            "completed_responder",
            "timeout",
            "invalid",
            "unknown_peer",
            "replayed",
            "rate_limited",
            "cookie_sent",
            "cookie_received",
            "no_common_cipher",
        ]);
    }

    #[test]
    fn drop_kinds_keep_their_keys_and_the_order_of_their_texts() {
        for reason in DropReason::ALL {
            let document = serde_json::to_value(DropKind::from(*reason)).unwrap();
            let (direction, label) = (reason.direction().label(), reason.label());
            assert_eq!(document, json!({ "direction": direction, "reason": label }));
            let read: DropKind = serde_json::from_value(document).unwrap();
            assert_eq!(read, DropKind::Known(*reason));
        }
        let mut kinds = [
            DropKind::from(DropReason::Replayed),
            DropKind::from_texts("ingress", "later_reason"),
            DropKind::from(DropReason::TooBig),
            DropKind::from(DropReason::NoRoute),
        ];
        kinds.sort();
        let reasons = kinds.each_ref().map(DropKind::reason);
        assert_eq!(reasons, ["no_route", "too_big", "later_reason", "replayed"]);
    }

    /// Returns a report with values that no release knows.
    fn report_of_another_release() -> Value {
        json!({
            "pid": 7, "uptime_seconds": 1.5, "revision": 3,
            "capabilities": [
                { "name": "tun_later", "state": "half_on", "reason": "it depends" },
                { "name": "udp_gso", "state": "forced_off", "reason": null },
            ],
            "confinement": [{ "mechanism": "later", "state": "half_on", "reason": null }],
            "lanes": [], "source_ports": [], "tun_queue_drops": 0,
            "drops": [
                { "direction": "ingress", "reason": "later_reason", "packets": 4 },
                { "direction": "sideways", "reason": "no_route", "packets": 5 },
                { "direction": "egress", "reason": "no_route", "packets": 6 },
            ],
            "handshakes": [{ "result": "later_result", "count": 1 }],
            "second_key_peers": 0, "narrow": [],
            "unreachable": [{ "name": "node-b", "reason": "a later reason" }],
            "peers": [{
                "name": "node-b", "public_key": "AQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQEBAQE=",
                "endpoint": null, "pod_cidrs": [], "state": "dormant", "reason": "a later reason",
                "cipher": "later-cipher", "lanes": null, "handshake_age_seconds": null,
                "last_received_seconds": null, "rtt_us": null, "path_mtu": null, "gso": false,
                "tx_packets": 0, "tx_bytes": 0, "rx_packets": 0, "rx_bytes": 0,
            }],
        })
    }

    #[test]
    fn report_of_another_release_is_readable_and_keeps_its_texts() {
        let document = json!({ "response": "report", "report": report_of_another_release() });
        let response: Response = serde_json::from_value(document.clone()).unwrap();
        assert_eq!(serde_json::to_value(&response).unwrap(), document);
        let Response::Report { report } = response else { panic!("{response:?} is no report") };
        let Report { capabilities, drops, peers, .. } = *report;
        assert_eq!(capabilities[0].name.known(), None);
        assert_eq!(capabilities[1].name, CapabilityName::UdpGso);
        assert_eq!(capabilities[1].state, CapabilityState::ForcedOff);
        assert_eq!(peers[0].state.to_string(), "dormant");
        let known: Vec<_> = drops.iter().map(|drop| drop.kind.known()).collect();
        assert_eq!(known, [None, None, Some(DropReason::NoRoute)]);
    }

    #[test]
    fn captured_packets_keep_their_keys() {
        let document = |direction: &str, reason: Value| {
            json!({
                "time_ns": 1, "lane": 0, "direction": direction, "reason": reason, "outer": null,
                "inner": true, "packets": 1, "length": 40, "bytes": "RQ==",
            })
        };
        for (direction, reason, kind) in [
            ("egress", Value::Null, PacketKind::Forwarded(Direction::Egress.into())),
            ("ingress", json!("replayed"), PacketKind::Dropped(DropReason::Replayed.into())),
            ("up", json!("later"), PacketKind::Dropped(DropKind::from_texts("up", "later"))),
            ("up", Value::Null, PacketKind::Forwarded(Reported::from_text("up"))),
        ] {
            let document = document(direction, reason);
            let packet: CapturedPacket = serde_json::from_value(document.clone()).unwrap();
            assert_eq!(packet.kind, kind);
            assert_eq!(serde_json::to_value(&packet).unwrap(), document);
        }
    }
}
