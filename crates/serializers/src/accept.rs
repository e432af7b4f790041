/// Which formats a consumer decodes.
///
/// The default accepts every format of the registry and refuses bodies without a content type.
///
/// ```
/// use polymq_serializers::{Accept, DecodeError, Serializers};
///
/// let serializers = Serializers::builtin();
/// let accept = Accept::only(["json"]).unlabelled_as("json");
/// serializers.check(&accept)?;
///
/// assert_eq!(serializers.resolve(&accept, None)?.name(), "json");
/// let refused = serializers.resolve(&accept, Some("application/msgpack"));
/// assert!(matches!(refused, Err(DecodeError::NotAccepted { .. })));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Accept {
    only: Option<Box<[Box<str>]>>,
    unlabelled: Option<Box<str>>,
}

impl Accept {
    /// Every format of the registry; the same as the default.
    pub fn any() -> Self {
        Self::default()
    }

    /// Only the serializers with these names. An empty list accepts nothing.
    pub fn only<N: Into<Box<str>>>(names: impl IntoIterator<Item = N>) -> Self {
        Self { only: Some(names.into_iter().map(Into::into).collect()), unlabelled: None }
    }

    /// Decodes bodies without a content type with the serializer of this name, which must be accepted too.
    ///
    /// Set it where a foreign producer sends no content type and is known to send this format.
    #[must_use]
    pub fn unlabelled_as(mut self, name: impl Into<Box<str>>) -> Self {
        self.unlabelled = Some(name.into());
        self
    }

    /// The names it is limited to, or `None` if every format is accepted.
    pub fn names(&self) -> Option<impl Iterator<Item = &str>> {
        self.only.as_ref().map(|names| names.iter().map(AsRef::as_ref))
    }

    /// The serializer for bodies without a content type, if one was set.
    pub fn unlabelled(&self) -> Option<&str> {
        self.unlabelled.as_deref()
    }

    pub(crate) fn is_any(&self) -> bool {
        self.only.is_none()
    }

    pub(crate) fn allows(&self, name: &str) -> bool {
        self.only.as_ref().is_none_or(|names| names.iter().any(|accepted| **accepted == *name))
    }
}
