//! What a registry takes, refuses and finds.

use crate::common::Custom;
use polymq_serializers::{Format, RegistryError, Serializers};

fn duplicate(error: RegistryError) -> (&'static str, String) {
    match &error {
        RegistryError::Duplicate { what, .. } => (what, error.to_string()),
        other => panic!("expected a duplicate, got {other}"),
    }
}

#[test]
fn builtin_formats_are_found_by_name_type_and_id() {
    let serializers = Serializers::builtin();
    for (name, content_type, id) in [
        ("json", "application/json", 1),
        ("msgpack", "application/vnd.msgpack", 2),
        ("text", "text/plain; charset=utf-8", 3),
        ("bytes", "application/octet-stream", 4),
    ] {
        let format = serializers.by_name(name).unwrap();
        assert_eq!((format.name(), format.content_type(), format.id()), (name, content_type, id));
        assert_eq!(format.static_content_type(), Some(content_type));
        assert_eq!(serializers.by_content_type(content_type), Some(format));
        assert_eq!(serializers.by_id(id), Some(format));
    }
    assert_eq!(serializers.names().collect::<Vec<_>>(), ["json", "msgpack", "text", "bytes"]);
}

#[test]
fn content_types_match_without_parameters_and_case() {
    let mut serializers = Serializers::builtin();
    serializers.add(Custom::arc("own", "application/vnd.own+json; v=1", 200)).unwrap();
    for (content_type, name) in [
        ("application/json", Some("json")),
        ("Application/JSON; charset=utf-8", Some("json")),
        ("text/json", Some("json")),
        ("application/cloudevents+json", Some("json")),
        ("application/cloudevents+json;charset=UTF-8", Some("json")),
        ("application/vnd.own+json", Some("own")),
        ("application/+json", None),
        ("image/svg+json", None),
        ("application/msgpack", Some("msgpack")),
        ("application/x-msgpack", Some("msgpack")),
        ("text/plain", Some("text")),
        ("text/plain; charset=\"UTF-8\"", Some("text")),
        ("text/plain; format=flowed; charset=us-ascii", Some("text")),
        ("text/plain; charset=utf-16", None),
        ("application/octet-stream", Some("bytes")),
        ("application/cbor", None),
        ("", None),
        (";", None),
    ] {
        assert_eq!(serializers.by_content_type(content_type).map(Format::name), name, "{content_type:?}");
    }
}

#[test]
fn a_taken_name_content_type_or_id_is_refused_and_both_are_named() {
    let mut serializers = Serializers::builtin();
    serializers.add(Custom::arc("cbor", "application/cbor", 100)).unwrap();
    for (custom, what, existing) in [
        (Custom::arc("cbor", "application/cbor2", 101), "name", "\"cbor\" (application/cbor, id 100)"),
        (Custom::arc("json", "application/mine", 101), "name", "\"json\" (application/json, id 1)"),
        (Custom::arc("cbor2", "Application/CBOR;v=2", 101), "content type", "\"cbor\" (application/cbor, id 100)"),
        (Custom::arc("mp", "application/x-msgpack", 101), "content type", "\"msgpack\""),
        (Custom::arc("latin", "text/plain; charset=latin1", 101), "content type", "\"text\""),
        (Custom::arc("cbor2", "application/cbor2", 100), "id", "\"cbor\" (application/cbor, id 100)"),
    ] {
        let added = format!("\"{}\"", custom.name());
        let (found, sentence) = duplicate(serializers.add(custom).unwrap_err());
        assert_eq!(found, what, "{sentence}");
        assert!(sentence.contains(existing) && sentence.contains(&added), "{sentence}");
    }
    assert_eq!(serializers.names().count(), 5);
}

#[test]
fn reserved_ids_are_refused() {
    let mut serializers = Serializers::builtin();
    for id in [0, 1, 5, 99] {
        let refused = serializers.add(Custom::arc("own", "application/own", id));
        assert_eq!(refused, Err(RegistryError::ReservedId { name: "own".into(), id }));
    }
    for (name, id) in [("low", 100), ("high", u16::MAX)] {
        let content_type = if id == 100 { "application/low" } else { "application/high" };
        serializers.add(Custom::arc(name, content_type, id)).unwrap();
    }
}

#[test]
fn unusable_names_and_content_types_are_refused() {
    for (name, content_type) in [("", "a/b"), ("a b", "a/b"), ("own", ""), ("own", "cbor"), ("own", "a/b c")] {
        let refused = Serializers::builtin().add(Custom::arc(name, content_type, 100));
        assert!(matches!(refused, Err(RegistryError::Invalid { .. })), "{name:?} {content_type:?}");
    }
}

#[test]
fn an_unknown_name_lists_the_known_ones_and_guesses() {
    let serializers = Serializers::builtin();
    for (asked, guess) in
        [("jsn", Some("json")), ("JSON", Some("json")), ("messagepack", Some("msgpack")), ("xml", None)]
    {
        let error = serializers.by_name(asked).unwrap_err();
        let expected = RegistryError::UnknownName {
            name: asked.into(),
            known: "json, msgpack, text, bytes".into(),
            guess: guess.map(Into::into),
        };
        assert_eq!(error, expected);
    }
    assert_eq!(
        serializers.by_name("jsn").unwrap_err().to_string(),
        "unknown serializer \"jsn\"; known: json, msgpack, text, bytes; did you mean \"json\"?"
    );
}

#[test]
fn a_clone_does_not_see_later_changes() {
    let before = Serializers::builtin();
    let mut after = before.clone();
    after.add(Custom::arc("own", "application/own", 100)).unwrap();
    after.bind_default("own").unwrap();
    assert!(before.by_id(100).is_none());
    assert_eq!(before.for_type::<u8>().unwrap(), &Format::JSON);
    assert_eq!(after.for_type::<u8>().unwrap().name(), "own");
}
