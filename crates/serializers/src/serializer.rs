use std::error::Error;
use std::fmt::Debug;

/// The error of a third-party serializer: anything that is an error and may cross threads.
pub type BoxError = Box<dyn Error + Send + Sync + 'static>;

/// The smallest wire id a third-party serializer may have; `0..=99` is reserved for polymq's own.
pub const FIRST_CUSTOM_ID: u16 = 100;

/// A wire format that another crate brings.
///
/// A serializer must be stateless towards its messages: the same value gives a body that any other process
/// with this serializer can read. It must not execute code found in a body, and must not reserve memory for a
/// length that the body only claims. It may assume that the body is no larger than
/// [`Limits::max_bytes`](crate::Limits::max_bytes), and that nesting deeper than
/// [`Limits::max_depth`](crate::Limits::max_depth) is stopped for it, as long as it recurses through serde.
///
/// Register it with [`register!`](crate::register) or [`Serializers::add`](crate::Serializers::add).
///
/// ```
/// use polymq_serializers::{BoxError, Serializer, erased_serde};
///
/// #[derive(Debug)]
/// struct PrettyJson;
///
/// impl Serializer for PrettyJson {
///     fn name(&self) -> &str { "pretty-json" }
///     fn content_type(&self) -> &str { "application/vnd.example.pretty+json" }
///     fn id(&self) -> u16 { 4711 }
///
///     fn encode(&self, value: &dyn erased_serde::Serialize) -> Result<Vec<u8>, BoxError> {
///         Ok(serde_json::to_vec_pretty(value)?)
///     }
///
///     fn decode(
///         &self,
///         body: &[u8],
///         visit: &mut dyn FnMut(&mut dyn erased_serde::Deserializer<'_>) -> Result<(), erased_serde::Error>,
///     ) -> Result<(), BoxError> {
///         let mut json = serde_json::Deserializer::from_slice(body);
///         visit(&mut <dyn erased_serde::Deserializer<'_>>::erase(&mut json))?;
///         Ok(json.end()?)
///     }
/// }
///
/// polymq_serializers::register!(PrettyJson);
/// # assert!(polymq_serializers::Serializers::linked().unwrap().by_name("pretty-json").is_ok());
/// ```
pub trait Serializer: Send + Sync + Debug {
    /// Short name that configuration uses, such as `cbor`. Unique in a registry.
    fn name(&self) -> &str;

    /// Content type that labels its bodies, such as `application/cbor`. Unique in a registry; parameters
    /// after a `;` are sent, and ignored when a content type is looked up.
    fn content_type(&self) -> &str;

    /// Number that stands for it where a protocol has no room for a name. Unique in a registry and at least
    /// [`FIRST_CUSTOM_ID`].
    fn id(&self) -> u16;

    /// Turns `value` into a body.
    ///
    /// # Errors
    ///
    /// Whatever the format cannot express.
    fn encode(&self, value: &dyn erased_serde::Serialize) -> Result<Vec<u8>, BoxError>;

    /// Reads `body`: builds a deserializer over it, calls `visit` with it once, and checks that nothing is
    /// left.
    ///
    /// # Errors
    ///
    /// A malformed body, or the error of `visit`, which must be passed on.
    fn decode(
        &self,
        body: &[u8],
        visit: &mut dyn FnMut(&mut dyn erased_serde::Deserializer<'_>) -> Result<(), erased_serde::Error>,
    ) -> Result<(), BoxError>;
}
