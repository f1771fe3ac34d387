//! Doc comments and names of a Rust file, taken from its tokens.
//!
//! Tokens are walked instead of a syntax tree, so that doc comments inside of macro calls count,
//! too.

use anyhow::anyhow;
use proc_macro2::{Delimiter, Group, TokenStream, TokenTree};

/// Derives whose doc comments are help text of the command line.
const HELP_DERIVES: [&str; 4] = ["Parser", "Args", "Subcommand", "ValueEnum"];

/// The doc comment of one item.
#[derive(Debug)]
pub(crate) struct Doc {
    /// Number of the first line.
    pub(crate) line: usize,
    /// Text without the comment marks, one line of text for each line of the source.
    pub(crate) text: String,
}

/// A name that an item declares.
#[derive(Debug)]
pub(crate) struct Name {
    /// Number of the line.
    pub(crate) line: usize,
    /// The identifier.
    pub(crate) text: String,
}

/// Doc comments and names of one file, as the rules need them.
#[derive(Debug, Default)]
pub(crate) struct Source {
    /// Doc comments outside of unit tests and of command line help.
    pub(crate) docs: Vec<Doc>,
    /// Names of constants and statics.
    pub(crate) constants: Vec<Name>,
    /// Names of test functions.
    pub(crate) tests: Vec<Name>,
}

/// Attributes that were read before the item that they belong to.
#[derive(Debug, Default)]
struct Pending {
    inner_doc: Option<Doc>,
    doc: Option<Doc>,
    is_unit_tests: bool,
    is_help: bool,
    is_test: bool,
}

/// Reads the tokens of a file.
///
/// # Errors
/// Returns an error if the text is not Rust.
pub(crate) fn parse(text: &str) -> anyhow::Result<Source> {
    let tokens: TokenStream = text.parse().map_err(|error| anyhow!("{error}"))?;
    let mut source = Source::default();
    walk(tokens, false, &mut source);
    Ok(source)
}

fn walk(tokens: TokenStream, skip_docs: bool, source: &mut Source) {
    let mut pending = Pending::default();
    let mut previous = String::new();
    for token in tokens {
        match token {
            TokenTree::Group(group) if previous == "#" || previous == "!" => {
                let inner = previous == "!";
                if !inner {
                    end_inner(&mut pending, skip_docs, source);
                }
                if !read_attribute(&group, inner, &mut pending) {
                    walk(group.stream(), skip_docs, source);
                }
                previous.clear();
            }
            TokenTree::Group(group) => {
                let skip = skip_docs || pending.is_unit_tests || pending.is_help;
                if group.delimiter() == Delimiter::Brace {
                    end_item(&mut pending, skip_docs, source);
                }
                walk(group.stream(), skip, source);
                previous.clear();
            }
            TokenTree::Ident(ident) => {
                end_inner(&mut pending, skip_docs, source);
                let name = Name { line: ident.span().start().line, text: ident.to_string() };
                match previous.as_str() {
                    "const" | "static" => source.constants.push(name),
                    "fn" if pending.is_test => source.tests.push(name),
                    _ => {}
                }
                previous = ident.to_string();
            }
            TokenTree::Punct(punct) => {
                if matches!(punct.as_char(), ';' | ',') {
                    end_item(&mut pending, skip_docs, source);
                }
                previous = punct.to_string();
            }
            TokenTree::Literal(_) => previous.clear(),
        }
    }
    end_item(&mut pending, skip_docs, source);
}

/// Stores the inner doc comment (`//!`) of the enclosing item. The caller has read the first token
/// after the inner attributes, so that the comment is complete.
fn end_inner(pending: &mut Pending, skip_docs: bool, source: &mut Source) {
    source.docs.extend(pending.inner_doc.take().filter(|_| !skip_docs));
}

/// Stores the doc comment of the item that ends here.
fn end_item(pending: &mut Pending, skip_docs: bool, source: &mut Source) {
    end_inner(pending, skip_docs, source);
    let Pending { doc, is_unit_tests, is_help, .. } = std::mem::take(pending);
    if !(skip_docs || is_unit_tests || is_help) {
        source.docs.extend(doc);
    }
}

/// Notes the attribute; returns false if the group is not an attribute.
fn read_attribute(group: &Group, inner: bool, pending: &mut Pending) -> bool {
    if group.delimiter() != Delimiter::Bracket {
        return false;
    }
    let tokens: Vec<TokenTree> = group.stream().into_iter().collect();
    match tokens.as_slice() {
        [TokenTree::Ident(name), TokenTree::Punct(_), TokenTree::Literal(text)]
            if name == "doc" =>
        {
            let line = text.span().start().line;
            let slot = if inner { &mut pending.inner_doc } else { &mut pending.doc };
            let doc = slot.get_or_insert_with(|| Doc { line, text: String::new() });
            doc.text.push_str(unquote(&text.to_string()).trim());
            doc.text.push('\n');
        }
        [TokenTree::Ident(name), TokenTree::Group(arguments)] if name == "cfg" => {
            pending.is_unit_tests |= arguments.stream().to_string() == "test";
        }
        [TokenTree::Ident(name), TokenTree::Group(arguments)] if name == "derive" => {
            pending.is_help |= arguments.stream().into_iter().any(|token| {
                matches!(&token, TokenTree::Ident(ident) if HELP_DERIVES.iter().any(|help| ident == help))
            });
        }
        _ => {
            pending.is_test |=
                matches!(tokens.last(), Some(TokenTree::Ident(name)) if name == "test");
        }
    }
    true
}

/// Turns a string literal into its text, as far as doc comments need it.
fn unquote(literal: &str) -> String {
    let text = literal.trim_start_matches('r').trim_matches('#');
    let text = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).unwrap_or(text);
    text.replace("\\\"", "\"").replace("\\'", "'").replace("\\n", "\n").replace("\\\\", "\\")
}
