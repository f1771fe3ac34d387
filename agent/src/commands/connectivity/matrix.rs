//! Results of probes, and the matrix that they make.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize};

use crate::status::{Align, Field, Tone, milliseconds, table};

/// Columns that a table shows; of larger clusters it shows who fails.
const COLUMNS: usize = 16;

/// Who is to be reached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    /// Its column.
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    /// Where it answers by TCP and UDP; `None`: by ICMP only.
    pub(crate) port: Option<u16>,
}

/// What came of one probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Outcome {
    pub(crate) from: String,
    pub(crate) to: String,
    pub(crate) address: IpAddr,
    pub(crate) protocol: Protocol,
    /// IP length in bytes of what was sent, or of all of it by TCP.
    pub(crate) bytes: usize,
    /// Microseconds until the answer.
    pub(crate) round_trip_us: Option<u64>,
    /// Why there was none.
    pub(crate) error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    Icmp,
    Tcp,
    Udp,
}

/// All pairs.
#[derive(Debug, Serialize)]
pub(crate) struct Matrix {
    pairs: Vec<Pair>,
    /// Who could not even probe, and why.
    silent: BTreeMap<String, String>,
}

#[derive(Debug, Serialize)]
struct Pair {
    from: String,
    to: String,
    ok: bool,
    /// The quickest answer in microseconds.
    round_trip_us: Option<u64>,
    probes: Vec<Outcome>,
}

impl Matrix {
    pub(crate) fn new(outcomes: Vec<Outcome>) -> Self {
        let mut pairs: BTreeMap<(String, String), Vec<Outcome>> = BTreeMap::new();
        for outcome in outcomes {
            let pair = (outcome.from.clone(), outcome.to.clone());
            pairs.entry(pair).or_default().push(outcome);
        }
        let pair = |((from, to), probes): (_, Vec<Outcome>)| Pair {
            from,
            to,
            ok: probes.iter().all(|probe| probe.error.is_none()),
            round_trip_us: probes.iter().filter_map(|probe| probe.round_trip_us).min(),
            probes,
        };
        Self { pairs: pairs.into_iter().map(pair).collect(), silent: BTreeMap::new() }
    }

    /// Notes who gave no results.
    pub(crate) fn silent(&mut self, from: &str, why: String) {
        self.silent.insert(from.to_owned(), why);
    }

    pub(crate) fn total(&self) -> usize {
        self.pairs.len() + self.silent.len()
    }

    pub(crate) fn failed(&self) -> usize {
        self.pairs.iter().filter(|pair| !pair.ok).count() + self.silent.len()
    }

    /// For people: the matrix, and what fails.
    pub(crate) fn render(&self) -> String {
        let columns: BTreeSet<&str> = self.pairs.iter().map(|pair| pair.to.as_str()).collect();
        let rows: BTreeSet<&str> = self.pairs.iter().map(|pair| pair.from.as_str()).collect();
        let mut text = String::new();
        if columns.len() <= COLUMNS {
            let cell = |from: &str, to: &str| -> Field {
                match self.pairs.iter().find(|pair| pair.from == from && pair.to == to) {
                    None => "".into(),
                    Some(pair) if pair.ok => {
                        let time = pair.round_trip_us.map(milliseconds).unwrap_or_default();
                        Field::toned(format!("ok {time}"), Tone::Good)
                    }
                    Some(_) => Field::toned("FAIL", Tone::Bad),
                }
            };
            let row = |from: &&str| -> Vec<Field> {
                let cells = columns.iter().map(|to| cell(from, to));
                std::iter::once((*from).into()).chain(cells).collect()
            };
            let mut titles = vec![("FROM \\ TO", Align::Left)];
            titles.extend(columns.iter().map(|name| (*name, Align::Left)));
            text += &(table(&titles, rows.iter().map(row)) + "\n\n");
        }
        let failed = self.pairs.iter().flat_map(|pair| &pair.probes);
        let failed: Vec<Vec<String>> = failed
            .filter_map(|probe| {
                let protocol = format!("{:?}", probe.protocol).to_lowercase();
                Some(vec![
                    probe.from.clone(),
                    probe.to.clone(),
                    probe.address.to_string(),
                    format!("{protocol}, {} bytes", probe.bytes),
                    probe.error.clone()?,
                ])
            })
            .collect();
        if !failed.is_empty() {
            let titles = ["FROM", "TO", "ADDRESS", "PROBE", "ERROR"].map(|t| (t, Align::Left));
            text += &(table(&titles, failed) + "\n\n");
        }
        for (from, why) in &self.silent {
            text += &format!("{from} gave no results: {why}\n");
        }
        let well = self.total() - self.failed();
        text + &format!("{well} of {} pairs are well\n", self.total())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn outcome(from: &str, to: &str, protocol: Protocol, error: Option<&str>) -> Outcome {
        Outcome {
            from: from.to_owned(),
            to: to.to_owned(),
            address: "10.2.0.1".parse().unwrap(),
            protocol,
            bytes: 84,
            round_trip_us: error.is_none().then_some(420),
            error: error.map(str::to_owned),
        }
    }

    #[test]
    fn a_pair_fails_where_one_of_its_probes_does() {
        let mut matrix = Matrix::new(vec![
            outcome("a", "b", Protocol::Icmp, None),
            outcome("a", "b", Protocol::Udp, Some("no answer within 2 s")),
            outcome("b", "a", Protocol::Icmp, None),
        ]);
        assert_eq!((matrix.failed(), matrix.total()), (1, 2));
        let text = matrix.render();
        assert!(text.contains("FAIL") && text.contains("ok 0.42 ms"), "{text}");
        assert!(text.contains("udp, 84 bytes") && text.contains("1 of 2 pairs"), "{text}");
        matrix.silent("c", "its pod does not run".to_owned());
        assert_eq!((matrix.failed(), matrix.total()), (2, 3));
        assert!(matrix.render().contains("c gave no results"));
    }

    #[test]
    fn of_a_large_cluster_only_failures_are_shown() {
        let all = (0..100).map(|n| {
            let error = (n == 7).then_some("refused");
            outcome("a", &format!("node-{n}"), Protocol::Tcp, error)
        });
        let text = Matrix::new(all.collect()).render();
        assert!(text.lines().count() < 8 && text.contains("node-7 "), "{text}");
    }
}
