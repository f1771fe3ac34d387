//! Bounded excerpts of untrusted text for errors and log lines.

use std::borrow::Cow;

/// Maximum length of an excerpt in bytes, without the note on its length.
const MAX_EXCERPT: usize = 200;
/// Maximum length of an error message that may quote untrusted text, in bytes.
const MAX_MESSAGE: usize = 1000;

/// Returns the first 200 bytes of `text` and the length of the rest. Every error and log line that
/// quotes text from a file, a request or another node quotes an excerpt.
///
/// ```
/// # use skein_cni_protocol::excerpt::excerpt;
/// assert_eq!(excerpt("10.1.0.0"), "10.1.0.0");
/// assert!(excerpt(&"x".repeat(1_000_000)).len() < 300);
/// ```
pub fn excerpt(text: &str) -> Cow<'_, str> {
    truncated(text, MAX_EXCERPT)
}

/// Returns the first 1,000 bytes of `text` and the length of the rest. For error messages of
/// parsers and of other programs, because parsers quote their input.
pub fn message_excerpt(text: &str) -> Cow<'_, str> {
    truncated(text, MAX_MESSAGE)
}

/// Returns the first `max` bytes of `text` and the length of the rest. The cut is between two
/// characters. A text of at most `max` bytes is returned unchanged.
pub fn truncated(text: &str, max: usize) -> Cow<'_, str> {
    if text.len() <= max {
        return Cow::Borrowed(text);
    }
    let end = (0..=max).rev().find(|end| text.is_char_boundary(*end)).unwrap_or_default();
    let (begin, rest) = text.split_at(end);
    Cow::Owned(format!("{begin}… ({} more bytes)", rest.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn excerpt_is_bounded_and_a_prefix_of_the_text(text in "\\PC{0,400}", max in 0_usize..300) {
            let short = truncated(&text, max);
            prop_assert!(short.len() <= max + 40);
            match short.split_once('…').filter(|_| text.len() > max) {
                Some((begin, _)) => prop_assert!(text.starts_with(begin)),
                None => prop_assert_eq!(&*short, &*text),
            }
        }
    }
}
