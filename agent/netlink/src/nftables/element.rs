//! Elements of sets and maps in the kernel's encoding.

use std::time::Duration;

use netlink_packet_netfilter::nftables::{
    DataAttribute, ListAttribute, SetElementAttribute, SetElementFlags, Verdict, VerdictAttribute,
};

use super::attribute::{attribute, attributes, number, text};

/// Verdict that drops a packet (linux/netfilter.h).
const NF_DROP: u32 = 0;
/// Verdict that accepts a packet (linux/netfilter.h).
const NF_ACCEPT: u32 = 1;

// Attributes of the kernel's answers (linux/netfilter/nf_tables.h).
const NFTA_SET_ELEM_KEY: u16 = 1;
const NFTA_SET_ELEM_DATA: u16 = 2;
const NFTA_SET_ELEM_FLAGS: u16 = 3;
const NFTA_DATA_VALUE: u16 = 1;
const NFTA_DATA_VERDICT: u16 = 2;
const NFTA_VERDICT_CODE: u16 = 1;
const NFTA_VERDICT_CHAIN: u16 = 2;
/// Flag of the element that ends an interval.
const NFT_SET_ELEM_INTERVAL_END: u32 = 1;

/// Verdict of an element of a verdict map.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub enum ElementVerdict {
    /// Accepts the packet.
    Accept,
    /// Drops the packet.
    Drop,
    /// Continues in the named chain, without return.
    Goto(String),
    /// Continues in the named chain, with return.
    Jump(String),
    /// Verdict that Skein does not write, by its code.
    Foreign(u32),
}

/// An element of a set or of a verdict map. An interval consists of two elements. The first element
/// has the first key of the interval. The second element has the key after the last key of the
/// interval, and the flag `interval_end`. The second element is absent if the interval ends with
/// the highest key.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Element {
    /// Key as in a packet; fields of a concatenation are padded to multiples of 4 bytes.
    pub key: Vec<u8>,
    /// True if the element ends an interval.
    pub interval_end: bool,
    /// Verdict; `None` in a set.
    pub verdict: Option<ElementVerdict>,
}

impl Element {
    /// Creates an element with this key, for a set without intervals.
    pub fn key(key: Vec<u8>) -> Self {
        Self { key, interval_end: false, verdict: None }
    }
}

/// Addition or removal of an element.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// Name of the set or map.
    pub set: String,
    /// Element to add or remove.
    pub element: Element,
    /// True if the element is added.
    pub added: bool,
    /// Time after which the kernel removes the element; `None` for no limit.
    pub timeout: Option<Duration>,
}

impl Change {
    /// Returns the attributes of the element for the kernel.
    pub(super) fn encode(&self) -> ListAttribute<SetElementAttribute> {
        let mut attributes =
            vec![SetElementAttribute::Key(DataAttribute::Value(self.element.key.clone()))];
        if self.element.interval_end {
            attributes.push(SetElementAttribute::Flags(SetElementFlags::IntervalEnd));
        }
        if !self.added {
            return ListAttribute::Element(attributes);
        }
        if let Some(verdict) = &self.element.verdict {
            attributes.push(SetElementAttribute::Data(DataAttribute::Verdict(encode(verdict))));
        }
        if let Some(timeout) = self.timeout {
            let milliseconds = u64::try_from(timeout.as_millis()).unwrap_or(u64::MAX);
            attributes.push(SetElementAttribute::Timeout(milliseconds));
        }
        ListAttribute::Element(attributes)
    }
}

fn encode(verdict: &ElementVerdict) -> Vec<VerdictAttribute> {
    let code = VerdictAttribute::Code;
    match verdict {
        ElementVerdict::Accept => vec![code(Verdict::Other(NF_ACCEPT))],
        ElementVerdict::Drop => vec![code(Verdict::Other(NF_DROP))],
        ElementVerdict::Foreign(other) => vec![code(Verdict::Other(*other))],
        ElementVerdict::Goto(chain) => {
            vec![code(Verdict::Goto), VerdictAttribute::Chain(chain.clone())]
        }
        ElementVerdict::Jump(chain) => {
            vec![code(Verdict::Jump), VerdictAttribute::Chain(chain.clone())]
        }
    }
}

/// Fuzzing entry point: parses `data` as the attributes of an element. A key is part of the input.
#[cfg(any(test, feature = "fuzzing"))]
pub(crate) fn fuzz_element(data: &[u8]) {
    assert!(parse(data).is_none_or(|element| element.key.len() < data.len()));
}

/// Parses an element of the kernel's answer; `None` if the element has no key.
pub(super) fn parse(bytes: &[u8]) -> Option<Element> {
    let key = attribute(attribute(bytes, NFTA_SET_ELEM_KEY)?, NFTA_DATA_VALUE)?.to_vec();
    let flags = attribute(bytes, NFTA_SET_ELEM_FLAGS).and_then(number).unwrap_or(0);
    let data = attribute(bytes, NFTA_SET_ELEM_DATA);
    let verdict = data.and_then(|data| attribute(data, NFTA_DATA_VERDICT));
    Some(Element {
        key,
        interval_end: flags & NFT_SET_ELEM_INTERVAL_END != 0,
        verdict: verdict.and_then(parse_verdict),
    })
}

fn parse_verdict(bytes: &[u8]) -> Option<ElementVerdict> {
    let (mut code, mut chain) = (None, None);
    for (kind, value) in attributes(bytes) {
        match kind {
            NFTA_VERDICT_CODE => code = number(value),
            NFTA_VERDICT_CHAIN => chain = text(value).map(str::to_owned),
            _ => {}
        }
    }
    let code = code?;
    Some(match (code, Verdict::from(code), chain) {
        (NF_ACCEPT, ..) => ElementVerdict::Accept,
        (NF_DROP, ..) => ElementVerdict::Drop,
        (_, Verdict::Goto, Some(chain)) => ElementVerdict::Goto(chain),
        (_, Verdict::Jump, Some(chain)) => ElementVerdict::Jump(chain),
        _ => ElementVerdict::Foreign(code),
    })
}
