//! Counts, limits and their table.

use std::collections::BTreeMap;
use std::fmt::Write;

/// Largest share of doc comments with an unclear opening, percent of a crate's doc comments.
const MAX_OPENINGS: usize = 6;
/// Largest share of doc comments of three words or fewer, percent of a crate's doc comments.
const MAX_SHORT: usize = 8;
/// Rules with the number of hits that the whole tree may have.
const LIMITS: [(&str, usize); 8] = [
    ("sentences continued on another item", 0),
    ("errors without conditions", 0),
    ("vague expressions", 20),
    ("vague constants", 0),
    ("long test names", 10),
    ("long files", 6),
    ("wide comments", 0),
    ("wide Markdown", 0),
];

/// Hits of all rules, and the number of doc comments of each crate, from which the shares in
/// percent are computed.
#[derive(Debug, Default)]
pub(crate) struct Report {
    docs: BTreeMap<String, usize>,
    /// Number of hits by rule and crate, for rules whose limit is a share of the doc comments.
    crate_hits: BTreeMap<(&'static str, String), usize>,
    found: BTreeMap<&'static str, Vec<String>>,
}

impl Report {
    /// Counts a doc comment of a crate.
    pub(crate) fn count_doc(&mut self, package: &str) {
        *self.docs.entry(package.to_owned()).or_default() += 1;
    }

    /// Records a hit of a rule whose limit is a share of a crate's doc comments. `path` is the path
    /// of the file.
    pub(crate) fn doc_hit(
        &mut self,
        rule: &'static str,
        package: &str,
        path: &str,
        line: usize,
        text: &str,
    ) {
        *self.crate_hits.entry((rule, package.to_owned())).or_default() += 1;
        self.hit(rule, path, line, text);
    }

    /// Records a hit of a rule whose limit is a number for the whole tree. `path` is the path of
    /// the file.
    pub(crate) fn hit(&mut self, rule: &'static str, path: &str, line: usize, text: &str) {
        self.found.entry(rule).or_default().push(format!("{path}:{line}: {text}"));
    }

    fn hits_in_crate(&self, rule: &'static str, package: &str) -> usize {
        self.crate_hits.get(&(rule, package.to_owned())).copied().unwrap_or_default()
    }

    fn total(&self, rule: &str) -> usize {
        self.found.get(rule).map_or(0, Vec::len)
    }

    /// Number of hits of a rule.
    #[cfg(test)]
    pub(crate) fn hits(&self, rule: &str) -> usize {
        self.total(rule)
    }

    /// Number of doc comments that were counted.
    #[cfg(test)]
    pub(crate) fn docs(&self) -> usize {
        self.docs.values().sum()
    }

    /// Tells whether every limit is kept.
    pub(crate) fn passed(&self) -> bool {
        self.exceeded().is_empty()
    }

    /// Returns the rules whose limit is exceeded.
    fn exceeded(&self) -> Vec<&'static str> {
        let mut rules = Vec::new();
        for (rule, limit) in [("unclear openings", MAX_OPENINGS), ("short doc comments", MAX_SHORT)]
        {
            let over = |(package, docs): (&String, &usize)| {
                self.hits_in_crate(rule, package) * 100 > limit * docs
            };
            if self.docs.iter().any(over) {
                rules.push(rule);
            }
        }
        rules.extend(
            LIMITS.iter().filter(|(rule, limit)| self.total(rule) > *limit).map(|(rule, _)| rule),
        );
        rules
    }

    /// Renders the counts, and the hits of each rule whose limit is exceeded, or of all rules.
    pub(crate) fn render(&self, list: bool) -> String {
        let mut out = String::new();
        let exceeded = self.exceeded();
        for (rule, hits) in &self.found {
            if list || exceeded.contains(rule) {
                let _ = writeln!(out, "{rule}:");
                for hit in hits {
                    let _ = writeln!(out, "  {hit}");
                }
            }
        }
        let _ = writeln!(
            out,
            "{:<24} {:>12} {:>18} {:>18}",
            "crate", "doc comments", "unclear openings", "short doc comments"
        );
        for (package, docs) in &self.docs {
            let percent = |rule| {
                let hits = self.hits_in_crate(rule, package);
                format!("{hits} ({:.1} %)", 100.0 * hits as f64 / *docs as f64)
            };
            let (openings, short) = (percent("unclear openings"), percent("short doc comments"));
            let _ = writeln!(out, "{package:<24} {docs:>12} {openings:>18} {short:>18}");
        }
        let _ = writeln!(out, "limit for each crate: {MAX_OPENINGS} %, {MAX_SHORT} %\n");
        for (rule, limit) in LIMITS {
            let _ = writeln!(out, "{rule:<35} {:>6}, limit {limit}", self.total(rule));
        }
        if !exceeded.is_empty() {
            let _ = writeln!(out, "\nabove the limit: {}", exceeded.join(", "));
        }
        out
    }
}
