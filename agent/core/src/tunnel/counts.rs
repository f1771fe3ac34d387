//! What became of handshakes, for the metrics.

macro_rules! handshake_results {
    ($($(#[$doc:meta])* $variant:ident => $label:literal;)*) => {
        /// What became of a handshake or of one of its messages; [`HandshakeResult::label`] is the
        /// metric's label and never changes.
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        #[repr(u8)]
        pub enum HandshakeResult { $($(#[$doc])* $variant,)* }

        impl HandshakeResult {
            /// Every result, in the order of their discriminants.
            pub const ALL: &'static [HandshakeResult] = &[$(HandshakeResult::$variant,)*];

            /// The value of the `result` label.
            pub const fn label(self) -> &'static str {
                match self { $(HandshakeResult::$variant => $label,)* }
            }
        }
    };
}

handshake_results! {
    /// This node sent an initiation (repetitions count).
    Initiated => "initiated";
    /// A session that this node started.
    CompletedInitiator => "completed_initiator";
    /// A session that the peer started, confirmed by something authentic in it.
    CompletedResponder => "completed_responder";
    /// An initiation that was not answered in time.
    Timeout => "timeout";
    /// A message that is malformed, fails its check or does not decrypt.
    Invalid => "invalid";
    /// An initiation by a key that no record holds.
    UnknownPeer => "unknown_peer";
    /// An initiation that is not newer than the last.
    Replayed => "replayed";
    /// An initiation refused since its source sends too many.
    RateLimited => "rate_limited";
    /// Under load, a cookie was sent instead of a response.
    CookieSent => "cookie_sent";
    /// A peer under load sent a cookie.
    CookieReceived => "cookie_received";
    /// The two ends have no cipher in common.
    NoCommonCipher => "no_common_cipher";
}

/// Handshakes by result, since the engine was made.
#[derive(Debug, Clone)]
pub(crate) struct HandshakeCounts([u64; HandshakeResult::ALL.len()]);

impl Default for HandshakeCounts {
    fn default() -> Self {
        Self([0; HandshakeResult::ALL.len()])
    }
}

impl HandshakeCounts {
    pub(crate) fn get(&self, result: HandshakeResult) -> u64 {
        self.0[result as usize]
    }

    pub(crate) fn add(&mut self, result: HandshakeResult) {
        self.0[result as usize] += 1;
    }
}
