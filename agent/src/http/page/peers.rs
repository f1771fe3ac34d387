//! A page of the peers, as it is asked for: found, sorted, cut.

use std::cmp::Ordering;

use serde::{Deserialize, Serialize};
use skein_ipc::{PeerReport, PeerState};

/// Peers in one answer at most.
const MOST: usize = 200;

/// Which peers.
#[derive(Debug, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(super) struct Ask {
    /// What their name, addresses or reason contain, in any case of letters.
    search: String,
    /// How they are.
    state: Option<PeerState>,
    sort: Sort,
    descending: bool,
    /// How many come before.
    offset: usize,
    limit: usize,
}

impl Default for Ask {
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

/// What they are sorted by; those that are equal, by name.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Sort {
    Name,
    /// What needs attention comes first.
    #[default]
    State,
    Rtt,
    Heard,
    Sent,
    Received,
    PathMtu,
}

/// The answer.
#[derive(Debug, Serialize)]
pub(super) struct Page<'a> {
    total: usize,
    matching: usize,
    offset: usize,
    peers: Vec<&'a PeerReport>,
}

/// The peers that are asked for.
pub(super) fn choose<'a>(peers: &'a [PeerReport], ask: &Ask) -> Page<'a> {
    let search = ask.search.trim().to_lowercase();
    let wanted = |peer: &&PeerReport| {
        ask.state.is_none_or(|state| peer.state == state) && contains(peer, &search)
    };
    let mut found: Vec<_> = peers.iter().filter(wanted).collect();
    found.sort_by(|a, b| order(a, b, ask).then_with(|| a.name.cmp(&b.name)));
    Page {
        total: peers.len(),
        matching: found.len(),
        offset: ask.offset,
        peers: found.into_iter().skip(ask.offset).take(ask.limit.min(MOST)).collect(),
    }
}

fn contains(peer: &PeerReport, search: &str) -> bool {
    let has = |text: &str| text.to_lowercase().contains(search);
    search.is_empty()
        || has(&peer.name)
        || peer.endpoint.is_some_and(|endpoint| has(&endpoint.to_string()))
        || peer.pod_cidrs.iter().any(|cidr| has(&cidr.to_string()))
        || peer.reason.as_deref().is_some_and(has)
}

fn order(a: &PeerReport, b: &PeerReport, ask: &Ask) -> Ordering {
    let turned = |order: Ordering| if ask.descending { order.reverse() } else { order };
    if matches!(ask.sort, Sort::Name) {
        return turned(a.name.cmp(&b.name));
    }
    let value = |peer: &PeerReport| match ask.sort {
        Sort::Name => None,
        Sort::State => Some(urgency(peer.state)),
        Sort::Rtt => peer.rtt_us.map(|us| us as f64),
        Sort::Heard => peer.last_received_seconds,
        Sort::Sent => Some(peer.tx_bytes as f64),
        Sort::Received => Some(peer.rx_bytes as f64),
        Sort::PathMtu => peer.path_mtu.map(f64::from),
    };
    match (value(a), value(b)) {
        (Some(a), Some(b)) => turned(a.total_cmp(&b)),
        // What is not known comes last, either way.
        (a, b) => b.is_some().cmp(&a.is_some()),
    }
}

fn urgency(state: PeerState) -> f64 {
    match state {
        PeerState::Unreachable => 0.0,
        PeerState::Connecting => 1.0,
        PeerState::Established => 2.0,
        PeerState::Idle => 3.0,
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

    fn names(ask: &Ask) -> Vec<String> {
        choose(&fleet(), ask).peers.iter().map(|peer| peer.name.clone()).collect()
    }

    #[test]
    fn what_needs_attention_comes_first() {
        assert_eq!(names(&Ask::default()), ["beta", "alpha", "delta", "gamma"]);
    }

    #[test]
    fn what_is_unknown_comes_last_either_way() {
        let by = |descending| Ask { sort: Sort::Rtt, descending, ..Ask::default() };
        assert_eq!(names(&by(false)), ["delta", "alpha", "beta", "gamma"]);
        assert_eq!(names(&by(true)), ["alpha", "delta", "beta", "gamma"]);
        let name = Ask { sort: Sort::Name, descending: true, ..Ask::default() };
        assert_eq!(names(&name), ["gamma", "delta", "beta", "alpha"]);
    }

    #[test]
    fn names_addresses_and_reasons_are_searched() {
        let search = |text: &str| names(&Ask { search: text.to_owned(), ..Ask::default() });
        assert_eq!(search(" ALPH"), ["alpha"]);
        assert_eq!(search("198.51"), ["gamma"]);
        assert_eq!(search("no answer"), ["beta"]);
        assert_eq!(search("10.2.0"), ["beta", "alpha", "delta", "gamma"]);
        let state = Ask { state: Some(PeerState::Established), ..Ask::default() };
        assert_eq!(names(&state), ["alpha", "delta"]);
    }

    #[test]
    fn an_answer_is_bounded() {
        let many: Vec<_> =
            (0..1000).map(|n| peer(&format!("node-{n:04}"), PeerState::Idle)).collect();
        let page = choose(&many, &Ask { limit: usize::MAX, ..Ask::default() });
        assert_eq!((page.total, page.matching, page.peers.len()), (1000, 1000, MOST));
        let last = choose(&many, &Ask { offset: 990, ..Ask::default() });
        assert_eq!((last.peers.len(), &*last.peers[0].name), (10, "node-0990"));
        assert!(choose(&many, &Ask { offset: usize::MAX, ..Ask::default() }).peers.is_empty());
    }
}
