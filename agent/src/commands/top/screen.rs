//! Layout of a sample as text, and the terminal that shows it.

use std::io::{self, Stdout, Write};

use crossterm::{cursor, execute, queue, style, terminal};
use skein_ipc::PeerState;

use super::sample::{Flow, Sample};
use super::size;
use crate::status::{Tone, age, count, milliseconds, paint, peer_tone};

/// Minimum number of lines for peers.
const MIN_PEER_LINES: usize = 4;
/// Maximum number of drop reasons shown.
const MAX_DROPS: usize = 8;

/// Formats a sample as at most `height` lines of at most `width` characters. A longer line is cut
/// and ends with `…`.
pub(super) fn lines(sample: &Sample, (width, height): (usize, usize)) -> Vec<String> {
    let mut lines = Vec::new();
    let mut add = |text: String, tone| lines.push((text, tone));
    let ready = if sample.ready { "ready" } else { "NOT READY: see skein-agent status" };
    let head = format!(
        "{}, {ready}, data process up {}, {:.1} s per sample (q: quit)",
        sample.node,
        age(sample.uptime_seconds),
        sample.seconds
    );
    add(head, if sample.ready { Tone::Plain } else { Tone::Bad });
    add(String::new(), Tone::Plain);
    add(
        format!(
            "{:<9}{:>9}{:>9}{:>9}{:>9}{:>11}{:>10}{:>13}",
            "", "INNER/S", "OUTER/S", "BIT/S", "CALLS/S", "PKTS/CALL", "SEGS/MSG", "INNER/OUTER"
        ),
        Tone::Plain,
    );
    add(flow("out", &sample.out), Tone::Good);
    add(flow("in", &sample.r#in), Tone::Good);
    if sample.lanes.len() > 1 {
        for lane in &sample.lanes {
            add(flow(&format!(" {} out", lane.lane), &lane.out), Tone::Plain);
            add(flow(&format!(" {} in", lane.lane), &lane.r#in), Tone::Plain);
        }
    }
    add(String::new(), Tone::Plain);
    add(format!("{:<9}{:<30}{:>9}{:>9}", "DROPS", "REASON", "PKT/S", "PACKETS"), Tone::Plain);
    for drop in sample.drops.iter().take(MAX_DROPS) {
        let tone = if drop.packets_per_second > 0.0 { Tone::Bad } else { Tone::Plain };
        let (now, all) = (count(drop.packets_per_second as u64), count(drop.packets));
        add(format!("{:<9}{:<30}{now:>9}{all:>9}", drop.direction, drop.reason), tone);
    }
    // If the terminal is small, the lines above are cut before the peers.
    let heading = 2;
    lines.truncate(height.saturating_sub(heading + MIN_PEER_LINES).max(5));
    let room = height.saturating_sub(lines.len() + heading);
    lines.push((String::new(), Tone::Plain));
    lines.push((
        format!(
            "{:<26}{:<13}{:>10}{:>10}{:>10}{:>10}{:>10}",
            "PEER", "STATE", "RTT", "TX BIT/S", "RX BIT/S", "TX PKT/S", "RX PKT/S"
        ),
        Tone::Plain,
    ));
    for peer in sample.peers.iter().take(room) {
        let rate = |of: fn(&crate::commands::peers::Rates) -> f64| {
            peer.rates.as_ref().map_or_else(|| "-".to_owned(), |rates| count(of(rates) as u64))
        };
        let rtt = peer.rtt_us.map_or_else(|| "-".to_owned(), milliseconds);
        let text = format!(
            "{:<26}{:<13}{rtt:>10}{:>10}{:>10}{:>10}{:>10}",
            peer.name,
            peer.state.to_string(),
            rate(|rates| rates.tx_bits_per_second),
            rate(|rates| rates.rx_bits_per_second),
            rate(|rates| rates.tx_packets_per_second),
            rate(|rates| rates.rx_packets_per_second),
        );
        let lost = peer.state == PeerState::Unreachable;
        lines.push((text, if lost { peer_tone(&peer.state) } else { Tone::Plain }));
    }
    // Without the mark, a number that lost its last digits would read as another number.
    let cut = |text: &str| match text.chars().count() > width {
        true => text.chars().take(width.saturating_sub(1)).chain(['…']).collect::<String>(),
        false => text.to_owned(),
    };
    lines.into_iter().map(|(text, tone)| paint(&cut(&text), tone)).take(height).collect()
}

fn flow(name: &str, flow: &Flow) -> String {
    let rate = |value: f64| count(value as u64);
    let mean =
        |value: Option<f64>| value.map_or_else(|| "-".to_owned(), |mean| format!("{mean:.1}"));
    format!(
        "{name:<9}{:>9}{:>9}{:>9}{:>9}{:>11}{:>10}{:>13}",
        rate(flow.inner_packets_per_second),
        rate(flow.outer_packets_per_second),
        rate(flow.bits_per_second),
        rate(flow.calls_per_second),
        mean(flow.packets_per_call),
        mean(flow.segments_per_message),
        mean(flow.inner_per_outer),
    )
}

/// Terminal in raw mode with an alternate screen. Drop and panic restore the terminal.
pub(super) struct Screen(Stdout);

impl Screen {
    pub(super) fn open() -> io::Result<Self> {
        let mut screen = Self(io::stdout());
        terminal::enable_raw_mode()?;
        // A panic message must appear on the original screen.
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            restore(&mut io::stdout());
            previous(panic);
        }));
        execute!(screen.0, terminal::EnterAlternateScreen, cursor::Hide)?;
        Ok(screen)
    }

    /// Draws the lines that `lines` returns for the terminal's size.
    pub(super) fn show(
        &mut self,
        lines: impl FnOnce((usize, usize)) -> Vec<String>,
    ) -> io::Result<()> {
        queue!(self.0, cursor::MoveTo(0, 0))?;
        for (row, line) in (0..).zip(lines(size())) {
            queue!(self.0, cursor::MoveTo(0, row), style::Print(line))?;
            queue!(self.0, terminal::Clear(terminal::ClearType::UntilNewLine))?;
        }
        queue!(self.0, terminal::Clear(terminal::ClearType::FromCursorDown))?;
        self.0.flush()
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        restore(&mut self.0);
    }
}

fn restore(stdout: &mut Stdout) {
    // Errors are ignored, because the terminal may be closed.
    let _ = execute!(stdout, cursor::Show, terminal::LeaveAlternateScreen);
    let _ = terminal::disable_raw_mode();
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::status::tests::{document, peer};

    fn sample(peers: usize) -> Sample {
        let (mut before, mut now) = (document(0), document(40_000));
        let all: Vec<_> =
            (0..peers).map(|n| peer(&format!("node-{n:04}"), PeerState::Established)).collect();
        before.report.as_mut().unwrap().peers.clone_from(&all);
        now.report.as_mut().unwrap().peers = all;
        Sample::between(&before, &now, Duration::from_secs(2))
    }

    #[test]
    fn sample_fits_any_terminal_size() {
        for (width, height) in [(80, 24), (200, 60), (20, 5), (1, 1), (80, 10)] {
            let lines = lines(&sample(1000), (width, height));
            assert!(lines.len() <= height, "{} lines on {height}", lines.len());
            assert!(lines.iter().all(|line| line.chars().count() <= width));
        }
        let lines = lines(&sample(3), (120, 40));
        assert!(lines.iter().any(|line| line.starts_with("out") && line.contains("20.0k")));
        assert!(lines.iter().any(|line| line.contains("node-0002")));
        assert!(lines.iter().any(|line| line.contains("replayed")));
    }

    #[test]
    fn line_wider_than_terminal_ends_with_ellipsis() {
        let out = |width| {
            let lines = lines(&sample(1), (width, 40));
            lines.into_iter().find(|line| line.starts_with("out")).unwrap()
        };
        let full = out(200);
        let width = full.chars().count();
        assert_eq!(out(width), full);
        let cut = out(width - 1);
        assert_eq!(cut.chars().count(), width - 1);
        assert!(cut.ends_with('…'), "{cut}");
    }

    #[test]
    fn small_terminal_shows_minimum_of_peers() {
        let lines = lines(&sample(1000), (80, 24));
        assert!(lines.iter().filter(|line| line.starts_with("node-0")).count() >= MIN_PEER_LINES);
    }
}
