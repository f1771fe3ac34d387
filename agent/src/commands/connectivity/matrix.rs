//! Results of probes, and the matrix that they make.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use serde::{Deserialize, Serialize, Serializer};

use crate::status::{Align, Field, Tone, milliseconds, printable, table};

/// Columns that a table shows; of larger clusters it shows who fails.
const COLUMNS: usize = 16;
/// Failing pairs whose probes a table shows.
const SHOWN: usize = 200;
/// Failing pairs of a row whose probes are kept: where all fail, as a large cluster's do at once, more of them say
/// nothing more, and have no room in a pod's log.
const IN_FULL: usize = 100;

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

/// What came of all probes of a pair. There is one for every two of a cluster: it is small.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cell {
    /// The quickest answer in microseconds.
    round_trip_us: Option<u64>,
    /// How many probes there were, and how many of them failed.
    probed: u32,
    failed: u32,
    /// All of them where one failed, unless the row has too many such pairs.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    probes: Vec<Outcome>,
}

impl Cell {
    fn ok(&self) -> bool {
        self.failed == 0
    }

    fn note(&mut self, probe: Outcome) {
        self.round_trip_us = self.round_trip_us.into_iter().chain(probe.round_trip_us).min();
        self.probed += 1;
        self.failed += u32::from(probe.error.is_some());
        self.probes.push(probe);
    }
}

/// A prober's row, in the order of the columns' names.
pub(crate) fn row<'a>(probes: impl IntoIterator<Item = (&'a str, Outcome)>) -> Vec<Cell> {
    let mut cells: BTreeMap<&str, Cell> = BTreeMap::new();
    for (to, probe) in probes {
        cells.entry(to).or_default().note(probe);
    }
    let mut failing = 0;
    for cell in cells.values_mut() {
        failing += usize::from(!cell.ok());
        if cell.ok() || failing > IN_FULL {
            cell.probes = Vec::new();
        }
    }
    cells.into_values().collect()
}

/// Who reaches whom.
#[derive(Debug, Serialize)]
pub(crate) struct Matrix {
    pairs: Pairs,
    /// Who could not probe, and why: rows without a result.
    silent: BTreeMap<String, String>,
    /// Who could not be probed, and why: columns without a result.
    absent: BTreeMap<String, String>,
}

/// The rows that have a result. Names stand here once, not once a pair.
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
    /// Without any row, with those who could not be probed, and why.
    pub(crate) fn new(targets: &[Target], absent: BTreeMap<String, String>) -> Self {
        let columns = targets.iter().map(|target| target.name.clone()).collect();
        let pairs = Pairs { columns, rows: BTreeMap::new() };
        Self { pairs, silent: BTreeMap::new(), absent }
    }

    /// A prober's row, or why it has none.
    pub(crate) fn note(&mut self, from: String, row: Result<Vec<Cell>, String>) {
        let columns = self.pairs.columns.len();
        match row {
            Ok(row) if row.len() == columns => drop(self.pairs.rows.insert(from, row)),
            Ok(row) => {
                let why = format!("it has probed {} of {columns} columns", row.len());
                self.silent.insert(from, why);
            }
            Err(why) => drop(self.silent.insert(from, why)),
        }
    }

    /// What is not well, in a line; `None` where all is.
    pub(crate) fn trouble(&self) -> Option<String> {
        let (pairs, failed) = (self.pairs.iter().count(), self.pairs.failing().count());
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
        let Self { pairs, silent, absent } = self;
        let columns = pairs.columns.iter().enumerate().map(|(index, to)| (to, Some(index)));
        let columns: BTreeMap<&String, Option<usize>> =
            absent.keys().map(|to| (to, None)).chain(columns).collect();
        let rows = pairs.rows.iter().map(|(from, cells)| (from, &cells[..]));
        let rows: BTreeMap<&String, &[Cell]> =
            silent.keys().map(|from| (from, &[][..])).chain(rows).collect();
        let mut text = String::new();
        if columns.len() <= COLUMNS {
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
        let shown = pairs.failing().filter(|pair| !pair.cell.probes.is_empty()).take(SHOWN);
        let shown = Vec::from_iter(shown);
        let line = |pair: &Pair<'_>, probe: &Outcome| {
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
            text += &format!("and {} more pairs: -o json names them\n", failed - shown.len());
        }
        for (from, why) in silent {
            text += &format!("{from} could not probe: {}\n", printable(why));
        }
        for (to, why) in absent {
            text += &format!("{to} could not be probed: {}\n", printable(why));
        }
        let all = pairs.iter().count();
        text + &format!("{} of {all} pairs are well\n", all - failed)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use serde_json::json;

    use super::*;

    fn outcome(protocol: Protocol, error: Option<&str>) -> Outcome {
        Outcome {
            address: "10.2.0.1".parse().unwrap(),
            protocol,
            bytes: 84,
            round_trip_us: error.is_none().then_some(420),
            error: error.map(str::to_owned),
        }
    }

    fn good(to: &str) -> (&str, Outcome) {
        (to, outcome(Protocol::Icmp, None))
    }

    fn matrix(columns: &[&str], absent: BTreeMap<String, String>) -> Matrix {
        let address = "10.2.0.1".parse().unwrap();
        let target = |name: &&str| Target { name: (*name).to_owned(), address, port: None };
        Matrix::new(&columns.iter().map(target).collect::<Vec<_>>(), absent)
    }

    #[test]
    fn a_pair_fails_where_one_of_its_probes_does_and_has_them_in_full() {
        let mut matrix = matrix(&["b", "a"], BTreeMap::new());
        let refused = ("b", outcome(Protocol::Udp, Some("refused")));
        let cells = row([good("b"), refused, good("a"), good("a")]);
        // As a pod's log has it.
        let text = serde_json::to_string(&cells).unwrap();
        matrix.note("c".to_owned(), Ok(serde_json::from_str(&text).unwrap()));
        assert!(matrix.trouble().unwrap().contains("1 of 2 pairs fail"));
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
    fn who_is_missing_is_shown_and_is_no_success() {
        let missing = |name: &str| BTreeMap::from([(name.to_owned(), "it is down".to_owned())]);
        let with = |absent| {
            let mut matrix = matrix(&["b"], absent);
            matrix.note("a".to_owned(), Ok(row([good("b")])));
            matrix
        };
        assert_eq!(with(BTreeMap::new()).trouble(), None);
        let mut matrix = with(missing("d"));
        matrix.note("c".to_owned(), Err("it is down".to_owned()));
        assert_eq!(matrix.trouble().unwrap(), "1 could not probe; 1 could not be probed");
        let text = matrix.render();
        let lines: Vec<Vec<&str>> = text.lines().map(|l| l.split_whitespace().collect()).collect();
        assert_eq!(lines[0], ["FROM", "\\", "TO", "b", "d"]);
        assert_eq!(lines[1], ["a", "ok", "0.42", "ms", "-"]);
        assert_eq!(lines[2], ["c", "-", "-"]);
        assert!(text.contains("d could not be probed: it is down"), "{text}");
        let json = serde_json::to_value(&matrix).unwrap();
        assert_eq!(json["absent"]["d"], "it is down");
        // Whoever has probed others than it should.
        matrix.note("e".to_owned(), Ok(row([good("b"), good("d")])));
        assert!(matrix.render().contains("e could not probe: it has probed 2 of 1 columns"));
        assert!(
            Matrix::new(&[], BTreeMap::new()).trouble().unwrap().contains("nothing was probed")
        );
    }

    #[test]
    fn of_a_large_cluster_only_failures_are_shown() {
        let names = Vec::from_iter((0..100).map(|n| format!("node-{n}")));
        let mut matrix = matrix(&Vec::from_iter(names.iter().map(String::as_str)), BTreeMap::new());
        let error = |name: &str| (name == "node-7").then_some("refused");
        let probe = |name: &'_ String| outcome(Protocol::Tcp, error(name));
        matrix.note("a".to_owned(), Ok(row(names.iter().map(|name| (name.as_str(), probe(name))))));
        let text = matrix.render();
        assert!(text.lines().count() < 8 && text.contains("node-7 "), "{text}");
    }

    #[test]
    fn where_everything_fails_not_every_probe_is_kept() {
        let names = Vec::from_iter((0..2 * IN_FULL).map(|n| format!("node-{n}")));
        let mut matrix = matrix(&Vec::from_iter(names.iter().map(String::as_str)), BTreeMap::new());
        let probe = || outcome(Protocol::Tcp, Some("refused"));
        for from in ["a", "b", "c"] {
            let cells = row(names.iter().map(|name| (name.as_str(), probe())));
            assert_eq!(cells.iter().filter(|cell| !cell.probes.is_empty()).count(), IN_FULL);
            matrix.note(from.to_owned(), Ok(cells));
        }
        let text = matrix.render();
        assert!(text.contains("and 400 more pairs") && text.contains("0 of 600 pairs"), "{text}");
    }
}
