//! Tables without borders, and colours of a terminal.

use comfy_table::{Cell, CellAlignment, Color, ContentArrangement, Table, presets};

/// Alignment of a column.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Align {
    Left,
    Right,
}

/// Meaning of a value. A terminal shows it as a colour, unless `NO_COLOR` is set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Tone {
    Plain,
    Good,
    Warn,
    Bad,
}

impl Tone {
    fn colour(self) -> Option<Color> {
        match self {
            Tone::Plain => None,
            Tone::Good => Some(Color::Green),
            Tone::Warn => Some(Color::Yellow),
            Tone::Bad => Some(Color::Red),
        }
    }
}

/// Cell of a table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Field {
    text: String,
    tone: Tone,
}

impl Field {
    /// Creates a cell with a tone.
    pub(crate) fn toned(text: impl Into<String>, tone: Tone) -> Self {
        Self { text: text.into(), tone }
    }
}

impl<T: Into<String>> From<T> for Field {
    fn from(text: T) -> Self {
        Self::toned(text, Tone::Plain)
    }
}

/// Escapes control characters, because texts of other machines must not control the terminal.
pub(crate) fn printable(text: &str) -> String {
    let shown = |c: char| match c.is_control() {
        true => c.escape_default().to_string(),
        false => c.to_string(),
    };
    text.chars().map(shown).collect()
}

/// Formats a table with a line of headings. Returns `-` if there are no rows.
pub(crate) fn table<F: Into<Field>>(
    columns: &[(&str, Align)],
    rows: impl IntoIterator<Item = Vec<F>>,
) -> String {
    let mut table = Table::new();
    if !colours() {
        table.force_no_tty();
    }
    // Lines are not wrapped, because programs read them, too.
    table.load_preset(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table.set_header(columns.iter().map(|(title, _)| *title));
    for row in rows {
        table.add_row(row.into_iter().map(|field| {
            let Field { text, tone } = field.into();
            let cell = Cell::new(printable(&text));
            match tone.colour() {
                Some(colour) => cell.fg(colour),
                None => cell,
            }
        }));
    }
    for (column, (_, align)) in table.column_iter_mut().zip(columns) {
        column.set_padding((0, 2));
        column.set_cell_alignment(match align {
            Align::Left => CellAlignment::Left,
            Align::Right => CellAlignment::Right,
        });
    }
    if table.row_iter().next().is_none() {
        return "-".to_owned();
    }
    table.trim_fmt()
}

/// Returns whether standard output is a terminal and `NO_COLOR` is not set (no-color.org).
pub(crate) fn colours() -> bool {
    let refused = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty());
    std::io::IsTerminal::is_terminal(&std::io::stdout()) && !refused
}

/// Colours `text` by its tone if colours are shown.
pub(crate) fn paint(text: &str, tone: Tone) -> String {
    use crossterm::style::Stylize;
    let colour = match tone {
        _ if !colours() => return text.to_owned(),
        Tone::Plain => return text.to_owned(),
        Tone::Good => crossterm::style::Color::Green,
        Tone::Warn => crossterm::style::Color::Yellow,
        Tone::Bad => crossterm::style::Color::Red,
    };
    text.with(colour).to_string()
}
