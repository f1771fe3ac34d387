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
    /// Who could not probe, and why: rows without a result.
    silent: BTreeMap<String, String>,
    /// Who could not be probed, and why: columns without a result.
    absent: BTreeMap<String, String>,
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
        let pairs = pairs.into_iter().map(pair).collect();
        Self { pairs, silent: BTreeMap::new(), absent: BTreeMap::new() }
    }

    /// The same with those who could not probe and those who could not be probed, and why.
    pub(crate) fn missing(
        self,
        silent: BTreeMap<String, String>,
        absent: BTreeMap<String, String>,
    ) -> Self {
        Self { silent, absent, ..self }
    }

    fn failed(&self) -> usize {
        self.pairs.iter().filter(|pair| !pair.ok).count()
    }

    /// What is not well, in a line; `None` where all is.
    pub(crate) fn trouble(&self) -> Option<String> {
        let (pairs, failed) = (self.pairs.len(), self.failed());
        let nothing = self.silent.is_empty() && self.absent.is_empty() && pairs == 0;
        let said = [
            (self.silent.len(), format!("{} could not probe", self.silent.len())),
            (self.absent.len(), format!("{} could not be probed", self.absent.len())),
            (nothing.into(), "nothing was probed: are there any peers?".to_owned()),
            (
                failed,
                format!(
                    "{failed} of {pairs} pairs fail: skein-agent trace FROM TO on the sender's node \
                     says why"
                ),
            ),
        ];
        let said: Vec<_> = said.into_iter().filter(|(n, _)| *n > 0).map(|(_, text)| text).collect();
        (!said.is_empty()).then(|| said.join("; "))
    }

    /// For people: the matrix, and what fails.
    pub(crate) fn render(&self) -> String {
        let columns = self.pairs.iter().map(|pair| &pair.to).chain(self.absent.keys());
        let columns: BTreeSet<&String> = columns.collect();
        let rows = self.pairs.iter().map(|pair| &pair.from).chain(self.silent.keys());
        let rows: BTreeSet<&String> = rows.collect();
        let mut text = String::new();
        if columns.len() <= COLUMNS {
            let cell = |from: &str, to: &str| -> Field {
                match self.pairs.iter().find(|pair| pair.from == from && pair.to == to) {
                    None => Field::toned("-", Tone::Bad),
                    Some(pair) if pair.ok => {
                        let time = pair.round_trip_us.map(milliseconds).unwrap_or_default();
                        Field::toned(format!("ok {time}"), Tone::Good)
                    }
                    Some(_) => Field::toned("FAIL", Tone::Bad),
                }
            };
            let row = |from: &&String| -> Vec<Field> {
                let cells = columns.iter().map(|to| cell(from, to));
                std::iter::once(from.as_str().into()).chain(cells).collect()
            };
            let mut titles = vec![("FROM \\ TO", Align::Left)];
            titles.extend(columns.iter().map(|name| (name.as_str(), Align::Left)));
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
            text += &format!("{from} could not probe: {why}\n");
        }
        for (to, why) in &self.absent {
            text += &format!("{to} could not be probed: {why}\n");
        }
        let all = self.pairs.len();
        text + &format!("{} of {all} pairs are well\n", all - self.failed())
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
        let matrix = Matrix::new(vec![
            outcome("a", "b", Protocol::Icmp, None),
            outcome("a", "b", Protocol::Udp, Some("no answer within 2 s")),
            outcome("b", "a", Protocol::Icmp, None),
        ]);
        assert!(matrix.trouble().unwrap().contains("1 of 2 pairs fail"));
        let text = matrix.render();
        assert!(text.contains("FAIL") && text.contains("ok 0.42 ms"), "{text}");
        assert!(text.contains("udp, 84 bytes") && text.contains("1 of 2 pairs"), "{text}");
    }

    #[test]
    fn who_is_missing_is_shown_and_is_no_success() {
        let good = || Matrix::new(vec![outcome("a", "b", Protocol::Icmp, None)]);
        let missing = |name: &str| BTreeMap::from([(name.to_owned(), "it is down".to_owned())]);
        assert_eq!(good().trouble(), None);
        let matrix = good().missing(missing("c"), BTreeMap::new());
        assert_eq!(matrix.trouble().unwrap(), "1 could not probe");
        let matrix = good().missing(missing("c"), missing("d"));
        assert_eq!(matrix.trouble().unwrap(), "1 could not probe; 1 could not be probed");
        let text = matrix.render();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["FROM", "\\", "TO", "b", "d"]);
        assert_eq!(lines[2], ["c", "-", "-"]);
        assert!(text.contains("d could not be probed: it is down"), "{text}");
        let json = serde_json::to_value(&matrix).unwrap();
        assert_eq!(json["absent"]["d"], "it is down");
        assert!(Matrix::new(vec![]).trouble().unwrap().contains("nothing was probed"));
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
