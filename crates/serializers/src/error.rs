use crate::serializer::BoxError;

/// A value could not become a body.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SerializeError {
    /// The body is larger than [`Limits::max_bytes`](crate::Limits::max_bytes).
    #[error(
        "the {format} body of `{type_name}` has {len} bytes, and {max_bytes} are allowed; send less, send a \
         reference to it, or raise `max_bytes`"
    )]
    TooLarge {
        /// Name of the serializer.
        format: Box<str>,
        /// Rust type of the value.
        type_name: &'static str,
        /// Size of the body.
        len: usize,
        /// The limit it exceeds.
        max_bytes: usize,
    },
    /// The format cannot express the value.
    #[error("cannot encode `{type_name}` as {format}: {source}")]
    Unsupported {
        /// Name of the serializer.
        format: Box<str>,
        /// Rust type of the value.
        type_name: &'static str,
        /// What the format said.
        source: BoxError,
    },
}

/// A body could not become a value, or was not allowed to.
///
/// The sentence it displays names what was found, what was expected and what to do. It never shows the body;
/// the [`source`](std::error::Error::source) of [`Malformed`](Self::Malformed) comes from the format's
/// library and may quote a fragment.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DecodeError {
    /// The message has no content type, and none was set with
    /// [`Accept::unlabelled_as`](crate::Accept::unlabelled_as).
    #[error(
        "the message has no content type and is not guessed at; accepted: {accepted}; label it where it is sent, \
         or set `unlabelled_as`"
    )]
    Unlabelled {
        /// Names of the serializers that are accepted.
        accepted: Box<str>,
    },
    /// No serializer of the registry reads this content type.
    #[error(
        "no serializer reads the content type {content_type:?}; known: {known}; register one, or change the sender"
    )]
    UnknownContentType {
        /// Content type of the message, shortened to 100 characters.
        content_type: Box<str>,
        /// Content types that are known.
        known: Box<str>,
    },
    /// A known serializer, but this consumer does not accept it.
    #[error(
        "the serializer \"{format}\" of content type {content_type:?} is not accepted here; accepted: {accepted}; \
         change the sender, or accept \"{format}\""
    )]
    NotAccepted {
        /// Name of the serializer.
        format: Box<str>,
        /// Content type of the message, shortened to 100 characters.
        content_type: Box<str>,
        /// Names of the serializers that are accepted.
        accepted: Box<str>,
    },
    /// The body is larger than [`Limits::max_bytes`](crate::Limits::max_bytes); it was not looked at.
    #[error("the body has {len} bytes, and {max_bytes} are allowed; send less, or raise `max_bytes`")]
    TooLarge {
        /// Size of the body.
        len: usize,
        /// The limit it exceeds.
        max_bytes: usize,
    },
    /// The values of the body nest deeper than [`Limits::max_depth`](crate::Limits::max_depth).
    #[error("the {format} body nests deeper than the allowed {max_depth} levels; flatten it, or raise `max_depth`")]
    TooDeep {
        /// Name of the serializer.
        format: Box<str>,
        /// The limit it exceeds.
        max_depth: usize,
    },
    /// The body is not of this format, or holds another type.
    #[error("cannot decode the body as {format} into `{type_name}`: {detail}; check what the sender sends")]
    Malformed {
        /// Name of the serializer.
        format: Box<str>,
        /// Rust type that was asked for.
        type_name: &'static str,
        /// What was expected, without any part of the body.
        detail: Box<str>,
        /// What the format said.
        source: BoxError,
    },
}

impl DecodeError {
    /// A [`Malformed`](Self::Malformed) for the type `T`.
    #[cold]
    pub(crate) fn malformed<T: ?Sized>(format: &str, detail: impl Into<Box<str>>, source: impl Into<BoxError>) -> Self {
        Self::Malformed {
            format: format.into(),
            type_name: std::any::type_name::<T>(),
            detail: detail.into(),
            source: source.into(),
        }
    }
}

impl SerializeError {
    /// An [`Unsupported`](Self::Unsupported) for the type `T`.
    #[cold]
    pub(crate) fn unsupported<T: ?Sized>(format: &str, source: impl Into<BoxError>) -> Self {
        Self::Unsupported { format: format.into(), type_name: std::any::type_name::<T>(), source: source.into() }
    }
}
