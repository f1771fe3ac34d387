//! Entry points of the fuzz targets for the output of `nft` and for messages of the kernel.

use crate::conntrack;
use crate::firewall::{counters, forward};
use crate::next_hop::fuzz_next_hops;
use crate::nftables::{self, monitor};

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/corpus_mutations.rs"]
mod corpus_mutations;

/// Reads the output of `nft -j` for arbitrary rules.
pub fn firewall_rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = counters::parse(text);
    forward::fuzz_printed(text);
}

/// Reads notifications of nftables, and dumps of set elements, connections and nexthop objects.
pub fn netlink_messages(data: &[u8]) {
    monitor::fuzz_notifications(data);
    nftables::fuzz_element(data);
    conntrack::fuzz_entry(data);
    fuzz_next_hops(data);
}

#[cfg(test)]
mod tests {
    use super::corpus_mutations::run_corpus_and_mutations;
    use super::*;

    #[test]
    fn fuzz_targets_accept_corpora_and_mutations() {
        run_corpus_and_mutations("firewall_rules", firewall_rules);
        run_corpus_and_mutations("netlink_messages", netlink_messages);
    }
}
