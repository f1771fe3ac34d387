//! The rules.

use crate::files::RustFile;
use crate::report::Report;
use crate::source::{self, Doc};

/// Opening words of a doc comment that hide the subject.
const OPENINGS: [&str; 47] = [
    "what",
    "whether",
    "who",
    "whose",
    "whoever",
    "where",
    "when",
    "which",
    "why",
    "how",
    "it",
    "its",
    "itself",
    "they",
    "these",
    "those",
    "that",
    "this",
    "one",
    "ones",
    "another",
    "other",
    "others",
    "nobody",
    "somebody",
    "someone",
    "whatever",
    "of",
    "as",
    "see",
    "since",
    "for",
    "from",
    "with",
    "by",
    "beside",
    "behind",
    "neither",
    "not",
    "nothing",
    "everything",
    "…",
    "...",
    "whom",
    "if",
    "because",
    "so",
];
/// Expressions that doc comments avoid.
const EXPRESSIONS: [&str; 13] = [
    "whoever",
    "nobody",
    "somebody",
    "anew",
    "at hand",
    "in force",
    "is none",
    "are none",
    "goes on",
    "go on",
    "a second look",
    "times a minute",
    "beside",
];
/// Forbidden names of constants. These names do not say which quantity the constant limits.
const VAGUE_CONSTANTS: [&str; 10] = [
    "PATIENCE",
    "LOOK",
    "SILENCE",
    "QUIET",
    "AGAIN",
    "TEND",
    "RECENT",
    "LIMIT",
    "OF_A_TYPE",
    "ELSEWHERE",
];
/// Widest line of a comment, characters.
const COMMENT_WIDTH: usize = 100;
/// Widest line of Markdown, characters.
const MARKDOWN_WIDTH: usize = 120;
/// Longest name of a test, characters.
const TEST_NAME_LENGTH: usize = 60;
/// Maximum number of lines of a file that does not count as long.
const FILE_LENGTH: usize = 500;

/// Checks one Rust file.
///
/// # Errors
/// Returns an error if the file is not Rust.
pub(crate) fn check_rust(file: &RustFile, report: &mut Report) -> anyhow::Result<()> {
    let source = source::parse(&file.text)
        .map_err(|error| error.context(format!("cannot parse {}", file.name)))?;
    if !file.unit_tests {
        for doc in &source.docs {
            check_doc(file, doc, report);
        }
    }
    for constant in source.constants {
        if VAGUE_CONSTANTS.contains(&constant.text.as_str()) {
            report.hit("vague constants", &file.name, constant.line, &constant.text);
        }
    }
    for test in source.tests {
        if test.text.len() > TEST_NAME_LENGTH {
            report.hit("long test names", &file.name, test.line, &test.text);
        }
    }
    let lines = file.text.lines().count();
    if lines > FILE_LENGTH {
        report.hit("long files", &file.name, lines, "lines");
    }
    for (number, line) in (1..).zip(file.text.lines()) {
        if line.trim_start().starts_with("//") && line.chars().count() > COMMENT_WIDTH {
            report.hit("wide comments", &file.name, number, line.trim());
        }
    }
    Ok(())
}

fn check_doc(file: &RustFile, doc: &Doc, report: &mut Report) {
    let first = doc.text.lines().next().unwrap_or_default();
    let words: Vec<&str> = doc.text.split_whitespace().collect();
    let opening = words.first().copied().unwrap_or_default();
    report.count_doc(&file.package);
    if is_unclear_opening(opening) {
        report.doc_hit("unclear openings", &file.package, &file.name, doc.line, first);
    }
    if words.len() <= 3 {
        report.doc_hit("short doc comments", &file.package, &file.name, doc.line, first);
    }
    if is_continued(&doc.text) {
        report.hit("sentences continued on another item", &file.name, doc.line, first);
    }
    if doc.text.contains("# Errors\nSee [") || doc.text.contains("# Errors\n\nSee [") {
        report.hit("errors without conditions", &file.name, doc.line, first);
    }
    let lower = doc.text.to_lowercase().replace('\n', " ");
    for expression in EXPRESSIONS {
        if contains_expression(&lower, expression) {
            report.hit(
                "vague expressions",
                &file.name,
                doc.line,
                &format!("{expression}: {first}"),
            );
        }
    }
}

fn is_unclear_opening(word: &str) -> bool {
    let word = word.to_lowercase();
    word.starts_with('…')
        || word.starts_with("...")
        || OPENINGS.contains(&word.trim_end_matches([',', ':', ';', '.']))
}

/// Tells whether the text begins or ends in the middle of a sentence.
fn is_continued(text: &str) -> bool {
    let text = text.trim();
    text.starts_with('…') || text.ends_with('…') || text.ends_with([',', ';'])
}

fn contains_expression(text: &str, expression: &str) -> bool {
    text.match_indices(expression).any(|(at, _)| {
        let before = text[..at].chars().next_back();
        let after = text[at + expression.len()..].chars().next();
        let ends_word = |c: Option<char>| c.is_none_or(|c| !c.is_alphanumeric() && c != '_');
        ends_word(before) && ends_word(after)
    })
}

/// Checks the width of the lines of one Markdown file. Tables, code blocks and lines with a link
/// are exempt. `path` is the path of the file.
pub(crate) fn check_markdown(path: &str, text: &str, report: &mut Report) {
    let mut in_code = false;
    for (number, line) in (1..).zip(text.lines()) {
        if line.trim_start().starts_with("```") {
            in_code = !in_code;
        }
        let exempt = in_code || line.starts_with('|') || line.contains("](");
        if !exempt && line.chars().count() > MARKDOWN_WIDTH {
            report.hit("wide Markdown", path, number, line);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(text: &str) -> Report {
        let file = RustFile {
            name: "lib.rs".to_owned(),
            package: "agent".to_owned(),
            text: text.to_owned(),
            unit_tests: false,
        };
        let mut report = Report::default();
        check_rust(&file, &mut report).expect("the text is Rust");
        report
    }

    #[test]
    fn unclear_opening_counts() {
        let report =
            check("/// What the peer said.\nstruct A;\n/// Address of the peer.\nstruct B;");
        assert_eq!(report.hits("unclear openings"), 1);
        assert_eq!(report.docs(), 2);
    }

    #[test]
    fn doc_inside_macro_call_counts() {
        let report = check("reasons! { /// Of a peer that is gone.\n Gone, }");
        assert_eq!(report.hits("unclear openings"), 1);
    }

    #[test]
    fn unit_tests_and_help_do_not_count() {
        let report = check(
            "#[cfg(test)]\nmod tests {\n/// What.\nfn a() {}\n}\n\
             /// What.\n#[derive(Debug, clap::Parser)]\nstruct Options {\n/// What.\na: u8,\n}",
        );
        assert_eq!(report.docs(), 0);
    }

    #[test]
    fn lines_of_one_comment_count_once() {
        let report = check(
            "//! Lanes of the data process.\n//! What they share.\n\n/// A lane\n/// of it.\nstruct A;",
        );
        assert_eq!(report.docs(), 2);
        assert_eq!(report.hits("unclear openings"), 0);
    }

    #[test]
    fn continued_sentence_is_found() {
        let report = check("/// The address…\nstruct A;\n/// …of the peer.\nstruct B;");
        assert_eq!(report.hits("sentences continued on another item"), 2);
    }

    #[test]
    fn names_are_found() {
        let report = check(&format!(
            "const PATIENCE: u8 = 1;\n#[test]\nfn {}() {{}}",
            "a".repeat(TEST_NAME_LENGTH + 1)
        ));
        assert_eq!(report.hits("vague constants"), 1);
        assert_eq!(report.hits("long test names"), 1);
    }

    #[test]
    fn wide_markdown_is_found_outside_of_tables() {
        let mut report = Report::default();
        let wide = "a ".repeat(MARKDOWN_WIDTH);
        check_markdown("a.md", &format!("{wide}\n|{wide}|\n```\n{wide}\n```\n"), &mut report);
        assert_eq!(report.hits("wide Markdown"), 1);
    }
}
