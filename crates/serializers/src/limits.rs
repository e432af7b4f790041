/// What a body may cost: its size in bytes and how deep its values nest.
///
/// Decoding refuses a larger body before it looks inside, and a deeper one with an error instead of a stack
/// overflow. Memory stays in proportion to the body: a length that the body only claims reserves nothing.
/// Encoding refuses a result larger than `max_bytes`, so that what is sent can be read.
///
/// ```
/// use polymq_serializers::Limits;
///
/// let small = Limits { max_bytes: 64 * 1024, ..Limits::default() };
/// assert_eq!(small.max_depth, 128);
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Limits {
    /// Largest body in bytes; 16 MiB unless set. Too small refuses honest messages, too large lets one
    /// message take the memory of many: keep it near the broker's own limit.
    pub max_bytes: usize,
    /// Deepest nesting; 128 unless set. A scalar is one deep, each list or map around it adds one. Values
    /// above [`DEPTH_CEILING`](Self::DEPTH_CEILING) act as the ceiling.
    ///
    /// At the ceiling, JSON that is skipped (a field the type does not have) is not counted: skipping does
    /// not recurse. Below it, the whole body is counted. In third-party formats an option or a newtype counts
    /// too.
    pub max_depth: usize,
}

impl Limits {
    /// The limits used where none are named: 16 MiB, 128 deep.
    pub const DEFAULT: Self = Self { max_bytes: 16 * 1024 * 1024, max_depth: Self::DEPTH_CEILING };

    /// The deepest nesting any setting allows. More could overflow the two-megabyte stack of a worker thread.
    pub const DEPTH_CEILING: usize = 128;

    /// Lists and maps that may enclose each other.
    pub(crate) fn max_containers(&self) -> usize {
        self.max_depth.min(Self::DEPTH_CEILING).saturating_sub(1)
    }
}

impl Default for Limits {
    fn default() -> Self {
        Self::DEFAULT
    }
}
