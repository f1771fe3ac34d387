//! Content of a table, as the kernel reports it.

use std::collections::{BTreeMap, BTreeSet};

use rtnetlink::packet_core::DefaultNla;

use super::attribute::{attribute, attributes, long_number, number, text};
use super::connection::{Connection, NftablesError, raw};
use super::element::{Element, parse};
use super::message::NFTA_TABLE;

// Types of requests (linux/netfilter/nf_tables.h).
const NFT_MSG_GETTABLE: u8 = 1;
const NFT_MSG_GETCHAIN: u8 = 4;
const NFT_MSG_GETRULE: u8 = 7;
const NFT_MSG_GETSET: u8 = 10;
const NFT_MSG_GETSETELEM: u8 = 13;
const NFT_MSG_GETOBJ: u8 = 19;
// Attributes (linux/netfilter/nf_tables.h).
const NFTA_TABLE_FLAGS: u16 = 2;
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_EXPRESSIONS: u16 = 4;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_ELEM_LIST_SET: u16 = 2;
const NFTA_SET_ELEM_LIST_ELEMENTS: u16 = 3;
const NFTA_OBJ_NAME: u16 = 2;
const NFTA_OBJ_TYPE: u16 = 3;
const NFTA_OBJ_DATA: u16 = 4;
const NFT_OBJECT_COUNTER: u32 = 1;
const NFTA_COUNTER_BYTES: u16 = 1;
const NFTA_COUNTER_PACKETS: u16 = 2;
/// Flag of a table whose chains are inactive (linux/netfilter/nf_tables.h).
const NFT_TABLE_F_DORMANT: u32 = 1;

/// Names of the objects of a table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Objects {
    /// True if the table's chains are inactive (`flags dormant`).
    pub dormant: bool,
    /// Sets and maps with names.
    pub sets: BTreeSet<String>,
    /// Chains, with the expressions of their rules in the kernel's encoding.
    pub chains: BTreeMap<String, Vec<Vec<u8>>>,
    /// Counters with names.
    pub counters: BTreeMap<String, Count>,
}

/// Value of a counter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Count {
    /// Number of packets.
    pub packets: u64,
    /// Number of bytes of these packets.
    pub bytes: u64,
}

impl Connection {
    /// Returns the objects of a table of the family inet; `None` if the table does not exist.
    ///
    /// # Errors
    /// [`NftablesError`] if a dump fails, or if changes interrupt the dump 10 times.
    pub fn objects(&mut self, table: &str) -> Result<Option<Objects>, NftablesError> {
        let mut flags = Vec::new();
        let request = raw(NFT_MSG_GETTABLE, Vec::new());
        self.dump(&request, &mut flags, |attributes| {
            let flags = attribute(attributes, NFTA_TABLE_FLAGS).and_then(number).unwrap_or(0);
            is_in(table, attributes).then_some(flags)
        })?;
        let Some(flags) = flags.first() else { return Ok(None) };
        let mut objects =
            Objects { dormant: flags & NFT_TABLE_F_DORMANT != 0, ..Objects::default() };
        let mut names = Vec::new();
        self.dump(&raw(NFT_MSG_GETSET, of(table)), &mut names, |attributes| {
            named(table, attributes, NFTA_SET_NAME)
        })?;
        objects.sets.extend(names.drain(..));
        self.dump(&raw(NFT_MSG_GETCHAIN, Vec::new()), &mut names, |attributes| {
            named(table, attributes, NFTA_CHAIN_NAME)
        })?;
        objects.chains.extend(names.drain(..).map(|name| (name, Vec::new())));
        let mut rules = Vec::new();
        self.dump(&raw(NFT_MSG_GETRULE, of(table)), &mut rules, |attributes| {
            let chain = named(table, attributes, NFTA_RULE_CHAIN)?;
            let rule = attribute(attributes, NFTA_RULE_EXPRESSIONS).unwrap_or_default();
            Some((chain, rule.to_vec()))
        })?;
        for (chain, rule) in rules {
            objects.chains.entry(chain).or_default().push(rule);
        }
        objects.counters = self.counters(table)?;
        Ok(Some(objects))
    }

    /// Returns the counters of a table; none if the table does not exist.
    ///
    /// # Errors
    /// [`NftablesError`] if the dump fails, or if changes interrupt the dump 10 times.
    pub fn counters(&mut self, table: &str) -> Result<BTreeMap<String, Count>, NftablesError> {
        let mut counters = Vec::new();
        self.dump(&raw(NFT_MSG_GETOBJ, of(table)), &mut counters, |attributes| {
            let name = named(table, attributes, NFTA_OBJ_NAME)?;
            let kind = attribute(attributes, NFTA_OBJ_TYPE).and_then(number)?;
            let data = attribute(attributes, NFTA_OBJ_DATA)?;
            let value = |kind| attribute(data, kind).and_then(long_number).unwrap_or(0);
            let (bytes, packets) = (value(NFTA_COUNTER_BYTES), value(NFTA_COUNTER_PACKETS));
            (kind == NFT_OBJECT_COUNTER).then_some((name, Count { packets, bytes }))
        })?;
        Ok(counters.into_iter().collect())
    }

    /// Returns the elements of a set or map; `None` if the set does not exist.
    ///
    /// # Errors
    /// [`NftablesError`] if the dump fails, or if changes interrupt the dump 10 times.
    pub fn elements(
        &mut self,
        table: &str,
        set: &str,
    ) -> Result<Option<Vec<Element>>, NftablesError> {
        let mut request = of(table);
        request.push(name_attribute(NFTA_SET_ELEM_LIST_SET, set));
        let mut lists = Vec::new();
        let exists = self.dump(&raw(NFT_MSG_GETSETELEM, request), &mut lists, |list| {
            let elements = attribute(list, NFTA_SET_ELEM_LIST_ELEMENTS)?;
            Some(attributes(elements).filter_map(|(_, element)| parse(element)).collect::<Vec<_>>())
        })?;
        Ok(exists.then(|| lists.into_iter().flatten().collect()))
    }
}

/// Returns the attribute that limits a dump to a table. Kernels ignore the attribute in dumps of
/// tables and chains.
fn of(table: &str) -> Vec<DefaultNla> {
    vec![name_attribute(NFTA_TABLE, table)]
}

fn name_attribute(kind: u16, name: &str) -> DefaultNla {
    let mut value = name.as_bytes().to_vec();
    value.push(0);
    DefaultNla::new(kind, value)
}

fn is_in(table: &str, attributes: &[u8]) -> bool {
    attribute(attributes, NFTA_TABLE).and_then(text) == Some(table)
}

/// Returns the name of an object if the object belongs to a table.
fn named(table: &str, attributes: &[u8], kind: u16) -> Option<String> {
    let name = attribute(attributes, kind).and_then(text)?;
    is_in(table, attributes).then(|| name.to_owned())
}
