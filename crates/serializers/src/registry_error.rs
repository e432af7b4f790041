/// A registry of serializers was asked for something it does not have, or set up in a way that contradicts
/// itself.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum RegistryError {
    /// No serializer has this name.
    #[error(
        "unknown serializer {name:?}; known: {known}{}",
        guess.as_ref().map(|guess| format!("; did you mean \"{guess}\"?")).unwrap_or_default()
    )]
    UnknownName {
        /// The name that was asked for.
        name: Box<str>,
        /// The names there are.
        known: Box<str>,
        /// The name that was probably meant.
        guess: Option<Box<str>>,
    },
    /// Two serializers claim the same name, content type or id.
    #[error("serializer {added} cannot be added: its {what} belongs to {existing}; choose another {what}")]
    Duplicate {
        /// `name`, `content type` or `id`.
        what: &'static str,
        /// The one that was refused, with its content type and id.
        added: Box<str>,
        /// The one that is registered, with its content type and id.
        existing: Box<str>,
    },
    /// A third-party serializer has an id that is kept for polymq.
    #[error("serializer {name:?} has the reserved id {id}; choose one from {} up", crate::FIRST_CUSTOM_ID)]
    ReservedId {
        /// Name of the serializer.
        name: Box<str>,
        /// Its id.
        id: u16,
    },
    /// A name, content type or group that could never be matched.
    #[error("the {what} {value:?} is not usable; expected {expected}")]
    Invalid {
        /// What it is: `serializer name`, `content type`, `group` or `unlabelled format`.
        what: &'static str,
        /// What was given.
        value: Box<str>,
        /// What would be usable.
        expected: &'static str,
    },
    /// The same type or group was bound to two serializers.
    #[error("{target} is bound to \"{bound}\" and cannot be bound to \"{refused}\" too; keep one of them")]
    AlreadyBound {
        /// The type or group.
        target: Box<str>,
        /// The serializer it has.
        bound: Box<str>,
        /// The serializer it was to get.
        refused: Box<str>,
    },
    /// Two fallback groups match a type equally well and name different serializers.
    #[error(
        "type `{type_name}` is matched by the fallbacks \"{first}\" and \"{second}\" alike; bind the type itself, or \
         name a longer group"
    )]
    Ambiguous {
        /// The type.
        type_name: &'static str,
        /// Group declared first.
        first: Box<str>,
        /// Group declared later.
        second: Box<str>,
    },
    /// No rule covers the type and there is no default.
    #[error("type `{type_name}` has no serializer; bind it, bind a group that contains it, or set a default")]
    Unbound {
        /// The type.
        type_name: &'static str,
    },
}
