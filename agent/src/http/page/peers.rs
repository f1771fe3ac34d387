//! Query of peers for the status page: filter, sort order, page.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use skein_ipc::{PeerReport, PeerState, Reported};

/// Maximum number of peers in one answer.
const MAX_PEERS: usize = 200;

/// Query parameters of `/api/peers`.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct PeerQuery {
    /// Part of name, endpoint, pod CIDRs or reason, compared without regard to case.
    search: String,
    /// Connection state; `None` selects all.
    state: Option<PeerState>,
    sort: Sort,
    descending: bool,
    /// Number of peers to skip.
    offset: usize,
    limit: usize,
}

impl Default for PeerQuery {
    fn default() -> Self {
        Self {
            search: String::new(),
            state: None,
            sort: Sort::default(),
            descending: false,
            offset: 0,
            limit: 50,
        }
    }
}

/// Sort key. Peers with equal keys are sorted by name.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    Name,
    /// Unreachable peers first, then connecting, established and idle ones.
    #[default]
    State,
    Rtt,
    Heard,
    Sent,
    Received,
    PathMtu,
}

/// Body of the answer.
#[derive(Debug, Serialize)]
pub(super) struct Page<'a> {
    total: usize,
    matching: usize,
    offset: usize,
    peers: Vec<&'a PeerReport>,
}

/// Returns the peers that the query selects.
pub(super) fn select<'a>(peers: &'a [PeerReport], query: &PeerQuery) -> Page<'a> {
    let search = query.search.trim().to_lowercase();
    let wanted = |peer: &&PeerReport| {
        query.state.is_none_or(|state| peer.state == state) && contains(peer, &search)
    };
    let mut found: Vec<_> = peers.iter().filter(wanted).collect();
    found.sort_by(|a, b| order(a, b, query).then_with(|| a.name.cmp(&b.name)));
    Page {
        total: peers.len(),
        matching: found.len(),
        offset: query.offset,
        peers: found.into_iter().skip(query.offset).take(query.limit.min(MAX_PEERS)).collect(),
    }
}

fn contains(peer: &PeerReport, search: &str) -> bool {
    let has = |text: &str| text.to_lowercase().contains(search);
    search.is_empty()
        || has(&peer.name)
        || peer.endpoint.is_some_and(|endpoint| has(&endpoint.to_string()))
        || peer.pod_cidrs.iter().any(|cidr| has(&cidr.to_string()))
        || peer.reason.as_ref().is_some_and(|reason| has(reason.text()))
}

fn order(a: &PeerReport, b: &PeerReport, query: &PeerQuery) -> Ordering {
    let turned = |order: Ordering| if query.descending { order.reverse() } else { order };
    if matches!(query.sort, Sort::Name) {
        return turned(a.name.cmp(&b.name));
    }
    let value = |peer: &PeerReport| match query.sort {
        Sort::Name => None,
        Sort::State => Some(urgency(&peer.state)),
        Sort::Rtt => peer.rtt_us.map(|us| us as f64),
        Sort::Heard => peer.last_received_seconds,
        Sort::Sent => Some(peer.tx_bytes as f64),
        Sort::Received => Some(peer.rx_bytes as f64),
        Sort::PathMtu => peer.path_mtu.map(f64::from),
    };
    match (value(a), value(b)) {
        (Some(a), Some(b)) => turned(a.total_cmp(&b)),
        // Unknown values come last in both directions.
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}

fn urgency(state: &Reported<PeerState>) -> f64 {
    match state.known() {
        Some(PeerState::Unreachable) => 0.0,
        Some(PeerState::Connecting) => 1.0,
        Some(PeerState::Established) => 2.0,
        Some(PeerState::Idle) | None => 3.0,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;
    use crate::status::tests::peer;

    fn fleet() -> Vec<PeerReport> {
        let mut fleet = vec![
            peer("alpha", PeerState::Established),
            peer("beta", PeerState::Unreachable),
            peer("gamma", PeerState::Idle),
            peer("delta", PeerState::Established),
        ];
        for (peer, rtt) in fleet.iter_mut().zip([Some(300), None, None, Some(100)]) {
            peer.rtt_us = rtt;
        }
        fleet[2].endpoint = Some("198.51.100.9:51900".parse().unwrap());
        fleet
    }

    fn names(query: &PeerQuery) -> Vec<String> {
        select(&fleet(), query).peers.iter().map(|peer| peer.name.clone()).collect()
    }

    #[test]
    fn unreachable_peers_come_first_by_default() {
        assert_eq!(names(&PeerQuery::default()), ["beta", "alpha", "delta", "gamma"]);
    }

    #[test]
    fn unknown_values_come_last_in_both_directions() {
        let by = |descending| PeerQuery { sort: Sort::Rtt, descending, ..PeerQuery::default() };
        assert_eq!(names(&by(false)), ["delta", "alpha", "beta", "gamma"]);
        assert_eq!(names(&by(true)), ["alpha", "delta", "beta", "gamma"]);
        let name = PeerQuery { sort: Sort::Name, descending: true, ..PeerQuery::default() };
        assert_eq!(names(&name), ["gamma", "delta", "beta", "alpha"]);
    }

    #[test]
    fn search_matches_names_addresses_and_reasons() {
        let search =
            |text: &str| names(&PeerQuery { search: text.to_owned(), ..PeerQuery::default() });
        assert_eq!(search(" ALPH"), ["alpha"]);
        assert_eq!(search("198.51"), ["gamma"]);
        assert_eq!(search("no answer"), ["beta"]);
        assert_eq!(search("10.2.0"), ["beta", "alpha", "delta", "gamma"]);
        let state = PeerQuery { state: Some(PeerState::Established), ..PeerQuery::default() };
        assert_eq!(names(&state), ["alpha", "delta"]);
    }

    #[test]
    fn answer_has_limited_number_of_peers() {
        let many: Vec<_> =
            (0..1000).map(|n| peer(&format!("node-{n:04}"), PeerState::Idle)).collect();
        let page = select(&many, &PeerQuery { limit: usize::MAX, ..PeerQuery::default() });
        assert_eq!((page.total, page.matching, page.peers.len()), (1000, 1000, MAX_PEERS));
        let last = select(&many, &PeerQuery { offset: 990, ..PeerQuery::default() });
        assert_eq!((last.peers.len(), &*last.peers[0].name), (10, "node-0990"));
        assert!(
            select(&many, &PeerQuery { offset: usize::MAX, ..PeerQuery::default() })
                .peers
                .is_empty()
        );
    }
}
