//! Entry points of the fuzz targets for the output of `nft` and for messages of the kernel.

use crate::firewall::{counters, forward};
use crate::next_hop::fuzz_next_hops;
use crate::nftables::monitor;

#[cfg(test)]
#[allow(clippy::unwrap_used)]
#[path = "../../fuzz/near_corpus.rs"]
mod near_corpus;

/// Reads the output of `nft -j` for arbitrary rules.
pub fn firewall_rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let _ = counters::parse(text);
    forward::fuzz_printed(text);
}

/// Reads notifications of nftables and dumps of nexthop objects.
pub fn netlink_messages(data: &[u8]) {
    monitor::fuzz_notifications(data);
    fuzz_next_hops(data);
}

#[cfg(test)]
mod tests {
    use super::near_corpus::run_near_corpus;
    use super::*;

    #[test]
    fn inputs_near_the_corpus_fail_no_assertion() {
        run_near_corpus("firewall_rules", firewall_rules);
        run_near_corpus("netlink_messages", netlink_messages);
    }
}
