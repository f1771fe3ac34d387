//! Results of probes, and the matrix that contains them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize, Serializer};

use crate::status::{Align, Field, Tone, milliseconds, printable, table};

/// Maximum number of columns of a printed matrix. Of a larger matrix, only failing pairs are
/// printed.
const MAX_COLUMNS: usize = 16;
/// Maximum number of failing pairs whose probes are printed.
const MAX_PRINTED_PAIRS: usize = 200;
/// Maximum number of failing pairs of a row whose probes are kept, so that a row fits in the log of
/// a pod.
const MAX_DETAILED_PAIRS: usize = 100;

/// Address that is probed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Target {
    /// Name of the column.
    pub(crate) name: String,
    pub(crate) address: IpAddr,
    /// Port of TCP and UDP probes; `None` if the address is probed by ICMP only.
    pub(crate) port: Option<u16>,
}

/// Result of one probe.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProbeResult {
    pub(crate) address: IpAddr,
    pub(crate) protocol: Protocol,
    /// Length of the IP packet that was sent, in bytes; for TCP the bytes of the whole stream.
    pub(crate) bytes: usize,
    /// Time until the answer in microseconds; `None` without an answer.
    pub(crate) round_trip_us: Option<u64>,
    /// Reason that there is no answer.
    pub(crate) error: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Protocol {
    Icmp,
    Tcp,
    Udp,
}

/// Result of all probes of a pair. A large cluster has millions of pairs, so the type is small.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// Shortest time until an answer in microseconds.
    round_trip_us: Option<u64>,
    /// Number of probes of the pair.
    probed: u32,
    /// Number of failed probes.
    failed: u32,
    /// All probes of a failing pair, for the first [`MAX_DETAILED_PAIRS`] such pairs of the row.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    probes: Vec<ProbeResult>,
}

impl Cell {
    fn ok(&self) -> bool {
        self.failed == 0
    }

    fn add(&mut self, probe: ProbeResult) {
        self.round_trip_us = self.round_trip_us.into_iter().chain(probe.round_trip_us).min();
        self.probed += 1;
        self.failed += u32::from(probe.error.is_some());
        self.probes.push(probe);
    }
}

/// Combines the probes of one prober into a row, in the order of the columns' names.
pub(crate) fn row<'a>(probes: impl IntoIterator<Item = (&'a str, ProbeResult)>) -> Vec<Cell> {
    let mut cells: BTreeMap<&str, Cell> = BTreeMap::new();
    for (to, probe) in probes {
        cells.entry(to).or_default().add(probe);
    }
    let mut failing = 0;
    for cell in cells.values_mut() {
        failing += usize::from(!cell.ok());
        if cell.ok() || failing > MAX_DETAILED_PAIRS {
            cell.probes = Vec::new();
        }
    }
    cells.into_values().collect()
}

/// Connectivity of all pairs of probers and targets.
#[derive(Debug, Serialize)]
pub(crate) struct Matrix {
    pairs: Pairs,
    /// Rows without a result: probers that could not probe, with the reason.
    silent: BTreeMap<String, String>,
    /// Columns without a result: targets that could not be probed, with the reason.
    absent: BTreeMap<String, String>,
}

/// Rows with a result. Each name is stored once, not once per pair.
#[derive(Debug)]
struct Pairs {
    columns: BTreeSet<String>,
    rows: BTreeMap<String, Vec<Cell>>,
}

#[derive(Serialize)]
struct Pair<'a> {
    from: &'a str,
    to: &'a str,
    ok: bool,
    #[serde(flatten)]
    cell: &'a Cell,
}

impl Pairs {
    fn iter(&self) -> impl Iterator<Item = Pair<'_>> {
        self.rows.iter().flat_map(|(from, cells)| {
            let cells = self.columns.iter().zip(cells);
            cells.map(move |(to, cell)| Pair { from, to, ok: cell.ok(), cell })
        })
    }

    fn failing(&self) -> impl Iterator<Item = Pair<'_>> {
        self.iter().filter(|pair| !pair.ok)
    }
}

impl Serialize for Pairs {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.iter())
    }
}

impl Matrix {
    /// Creates a matrix without rows. `absent` lists targets that cannot be probed, with the
    /// reason.
    pub(crate) fn new(targets: &[Target], absent: BTreeMap<String, String>) -> Self {
        let columns = targets.iter().map(|target| target.name.clone()).collect();
        let pairs = Pairs { columns, rows: BTreeMap::new() };
        Self { pairs, silent: BTreeMap::new(), absent }
    }

    /// Adds the row of a prober, or the reason that the row is missing.
    pub(crate) fn add_row(&mut self, from: String, row: anyhow::Result<Vec<Cell>>) {
        let columns = self.pairs.columns.len();
        match row {
            Ok(row) if row.len() == columns => drop(self.pairs.rows.insert(from, row)),
            Ok(row) => {
                let why = format!("probed {} of {columns} columns", row.len());
                self.silent.insert(from, why);
            }
            Err(error) => drop(self.silent.insert(from, format!("{error:#}"))),
        }
    }

    /// Summarizes all failures in one line; `None` if every pair passes.
    pub(crate) fn failure_summary(&self) -> Option<String> {
        let (pairs, failed) = (self.pairs.iter().count(), self.pairs.failing().count());
        let nothing = self.silent.is_empty() && self.absent.is_empty() && pairs == 0;
        let parts = [
            (self.silent.len(), format!("{} could not probe", self.silent.len())),
            (self.absent.len(), format!("{} could not be probed", self.absent.len())),
            (nothing.into(), "nothing was probed. Check that the node has peers.".to_owned()),
            (
                failed,
                format!(
                    "{failed} of {pairs} pairs fail. Run skein-agent trace FROM TO on the sender's node \
                     for the reason."
                ),
            ),
        ];
        let parts: Vec<_> =
            parts.into_iter().filter(|(n, _)| *n > 0).map(|(_, text)| text).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// Formats the matrix, the failing probes and the missing rows and columns for people.
    pub(crate) fn render(&self) -> String {
        let Self { pairs, silent, absent } = self;
        let columns = pairs.columns.iter().enumerate().map(|(index, to)| (to, Some(index)));
        let columns: BTreeMap<&String, Option<usize>> =
            absent.keys().map(|to| (to, None)).chain(columns).collect();
        let rows = pairs.rows.iter().map(|(from, cells)| (from, &cells[..]));
        let rows: BTreeMap<&String, &[Cell]> =
            silent.keys().map(|from| (from, &[][..])).chain(rows).collect();
        let mut text = String::new();
        if columns.len() <= MAX_COLUMNS {
            let field = |cell: Option<&Cell>| -> Field {
                match cell {
                    None => Field::toned("-", Tone::Bad),
                    Some(cell) if cell.ok() => {
                        let time = cell.round_trip_us.map(milliseconds).unwrap_or_default();
                        Field::toned(format!("ok {time}"), Tone::Good)
                    }
                    Some(_) => Field::toned("FAIL", Tone::Bad),
                }
            };
            let row = |(from, cells): (&&String, &&[Cell])| -> Vec<Field> {
                let cells =
                    columns.values().map(|index| field(index.and_then(|index| cells.get(index))));
                std::iter::once(from.as_str().into()).chain(cells).collect()
            };
            let mut titles = vec![("FROM \\ TO", Align::Left)];
            titles.extend(columns.keys().map(|name| (name.as_str(), Align::Left)));
            text += &(table(&titles, rows.iter().map(row)) + "\n\n");
        }
        let failed = pairs.failing().count();
        let shown =
            pairs.failing().filter(|pair| !pair.cell.probes.is_empty()).take(MAX_PRINTED_PAIRS);
        let shown = Vec::from_iter(shown);
        let line = |pair: &Pair<'_>, probe: &ProbeResult| {
            let protocol = format!("{:?}", probe.protocol).to_lowercase();
            Some(vec![
                pair.from.to_owned(),
                pair.to.to_owned(),
                probe.address.to_string(),
                format!("{protocol}, {} bytes", probe.bytes),
                probe.error.clone()?,
            ])
        };
        let lines = |pair| -> Vec<_> {
            let pair: &Pair<'_> = pair;
            pair.cell.probes.iter().filter_map(|probe| line(pair, probe)).collect()
        };
        if failed > 0 {
            let titles = ["FROM", "TO", "ADDRESS", "PROBE", "ERROR"].map(|t| (t, Align::Left));
            text += &(table(&titles, shown.iter().flat_map(lines)) + "\n\n");
        }
        if failed > shown.len() {
            text +=
                &format!("and {} more failing pairs, which -o json lists\n", failed - shown.len());
        }
        for (from, why) in silent {
            text += &format!("{from} could not probe: {}\n", printable(why));
        }
        for (to, why) in absent {
            text += &format!("{to} could not be probed: {}\n", printable(why));
        }
        let all = pairs.iter().count();
        text + &format!("{} of {all} pairs pass\n", all - failed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn probe(protocol: Protocol, error: Option<&str>) -> ProbeResult {
        ProbeResult {
            address: "10.2.0.1".parse().unwrap(),
            protocol,
            bytes: 84,
            round_trip_us: error.is_none().then_some(420),
            error: error.map(str::to_owned),
        }
    }

    fn good(to: &str) -> (&str, ProbeResult) {
        (to, probe(Protocol::Icmp, None))
    }

    fn matrix(columns: &[&str], absent: BTreeMap<String, String>) -> Matrix {
        let address = "10.2.0.1".parse().unwrap();
        let target = |name: &&str| Target { name: (*name).to_owned(), address, port: None };
        Matrix::new(&columns.iter().map(target).collect::<Vec<_>>(), absent)
    }

    #[test]
    fn pair_with_failed_probe_fails_and_keeps_all_probes() {
        let mut matrix = matrix(&["b", "a"], BTreeMap::new());
        let refused = ("b", probe(Protocol::Udp, Some("refused")));
        let cells = row([good("b"), refused, good("a"), good("a")]);
        // The row as the log of a pod contains it.
        let text = serde_json::to_string(&cells).unwrap();
        matrix.add_row("c".to_owned(), Ok(serde_json::from_str(&text).unwrap()));
        assert!(matrix.failure_summary().unwrap().contains("1 of 2 pairs fail"));
        let text = matrix.render();
        assert!(text.contains("FAIL") && text.contains("ok 0.42 ms"), "{text}");
        assert!(text.contains("udp, 84 bytes") && text.contains("1 of 2 pairs"), "{text}");
        let pairs = &serde_json::to_value(&matrix).unwrap()["pairs"];
        let well = json!({
            "from": "c", "to": "a", "ok": true, "round_trip_us": 420, "probed": 2, "failed": 0,
        });
        assert_eq!(pairs[0], well);
        assert_eq!((&pairs[1]["to"], &pairs[1]["ok"]), (&json!("b"), &json!(false)));
        assert_eq!((&pairs[1]["probed"], &pairs[1]["failed"]), (&json!(2), &json!(1)));
        assert_eq!(pairs[1]["probes"].as_array().unwrap().len(), 2);
    }

    #[test]
    fn missing_rows_and_columns_are_failures() {
        let missing =
            |name: &str| BTreeMap::from([(name.to_owned(), "the node is down".to_owned())]);
        let with = |absent| {
            let mut matrix = matrix(&["b"], absent);
            matrix.add_row("a".to_owned(), Ok(row([good("b")])));
            matrix
        };
        assert_eq!(with(BTreeMap::new()).failure_summary(), None);
        let mut matrix = with(missing("d"));
        matrix.add_row("c".to_owned(), Err(anyhow::anyhow!("the node is down")));
        assert_eq!(matrix.failure_summary().unwrap(), "1 could not probe; 1 could not be probed");
        let text = matrix.render();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["FROM", "\\", "TO", "b", "d"]);
        assert_eq!(lines[1], ["a", "ok", "0.42", "ms", "-"]);
        assert_eq!(lines[2], ["c", "-", "-"]);
        assert!(text.contains("d could not be probed: the node is down"), "{text}");
        let json = serde_json::to_value(&matrix).unwrap();
        assert_eq!(json["absent"]["d"], "the node is down");
        // A prober that probed other targets than it should.
        matrix.add_row("e".to_owned(), Ok(row([good("b"), good("d")])));
        assert!(matrix.render().contains("e could not probe: probed 2 of 1 columns"));
        assert!(
            Matrix::new(&[], BTreeMap::new())
                .failure_summary()
                .unwrap()
                .contains("nothing was probed")
        );
    }

    #[test]
    fn large_matrix_prints_only_failing_pairs() {
        let names = Vec::from_iter((0..100).map(|n| format!("node-{n}")));
        let mut matrix = matrix(&Vec::from_iter(names.iter().map(String::as_str)), BTreeMap::new());
        let error = |name: &str| (name == "node-7").then_some("refused");
        let result = |name: &'_ String| probe(Protocol::Tcp, error(name));
        matrix.add_row(
            "a".to_owned(),
            Ok(row(names.iter().map(|name| (name.as_str(), result(name))))),
        );
        let text = matrix.render();
        assert!(text.lines().count() < 8 && text.contains("node-7 "), "{text}");
    }

    #[test]
    fn row_keeps_probes_of_limited_failing_pairs() {
        let names = Vec::from_iter((0..2 * MAX_DETAILED_PAIRS).map(|n| format!("node-{n}")));
        let mut matrix = matrix(&Vec::from_iter(names.iter().map(String::as_str)), BTreeMap::new());
        let result = || probe(Protocol::Tcp, Some("refused"));
        for from in ["a", "b", "c"] {
            let cells = row(names.iter().map(|name| (name.as_str(), result())));
            assert_eq!(
                cells.iter().filter(|cell| !cell.probes.is_empty()).count(),
                MAX_DETAILED_PAIRS
            );
            matrix.add_row(from.to_owned(), Ok(cells));
        }
        let text = matrix.render();
        assert!(
            text.contains("and 400 more failing pairs") && text.contains("0 of 600 pairs"),
            "{text}"
        );
    }
}
