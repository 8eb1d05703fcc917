//! The one grammar of `--option key=value,key=value`, as a serde format.
//!
//! A struct that derives `Deserialize` with `deny_unknown_fields` is an option type, on the command line through
//! [`parse`] and in a configuration file through its own format. Keys that are unknown, repeated or missing and
//! values that do not fit are errors that name the key, say what it may be, and the nearest valid word.
//!
//! A comma inside a value is written twice (`path=a,,b` is the path `a,b`). A key of a list may be given several times
//! (`hostfwd=a,hostfwd=b`); in a configuration file it is an array. A key with a dot is a key of a struct inside
//! (`throttle.iops-total=100`); in a configuration file it is a table.

use std::fmt;
use std::marker::PhantomData;
use std::num::{IntErrorKind, ParseIntError};
use std::str::FromStr;

use serde::de::value::{MapAccessDeserializer, MapDeserializer, SeqDeserializer};
use serde::de::{self, DeserializeOwned, Deserializer, IntoDeserializer, MapAccess, Visitor};
use serde::forward_to_deserialize_any;

/// What a key without a value means.
const ON: &str = "on";

/// What is wrong with an option's text.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct OptionError(String);

/// Reads `text` as `key=value,...`. A first word without `=` is the value of `positional`, where the option has
/// such a key: with `Some("path")`, `disk.raw,readonly=on` means `path=disk.raw,readonly=on`. A later word
/// without `=` means `word=on`.
pub fn parse<T: DeserializeOwned>(text: &str, positional: Option<&str>) -> Result<T, OptionError> {
    let mut pairs: Vec<(String, Value)> = Vec::new();
    for (at, word) in split_commas(text).into_iter().enumerate() {
        let (key, value) = match (word.split_once('='), positional) {
            // A path may itself hold an '=': only what looks like a key is one, and not what looks like a file name.
            (Some((key, value)), _)
                if (is_key(key) || (at > 0 || positional.is_none()) && is_nearly_a_key(key))
                    && !(at == 0 && positional.is_some() && key.contains('.')) =>
            {
                (key.to_owned(), Some(value.to_owned()))
            }
            (_, Some(key)) if at == 0 => (key.to_owned(), Some(word)),
            _ if is_nearly_a_key(&word) => (word, None),
            _ => return Err(OptionError(format!("'{word}' is not of the form key=value"))),
        };
        let bare = value.is_none();
        let text = value.unwrap_or_else(|| ON.to_owned());
        insert(&mut pairs, &key, Word { key: key.clone(), text, bare })?;
    }
    T::deserialize(MapDeserializer::new(pairs.into_iter()))
}

/// Whether a word means on or off.
pub fn switch(word: &str) -> Option<bool> {
    match word {
        ON | "true" | "yes" | "1" => Some(true),
        "off" | "false" | "no" | "0" => Some(false),
        _ => None,
    }
}

/// `Deserialize` for a type that people write as a word or a number: everything its `FromStr` takes, from any
/// format.
pub fn from_word<'de, T, D>(deserializer: D) -> Result<T, D::Error>
where
    T: FromStr<Err: fmt::Display>,
    D: Deserializer<'de>,
{
    struct WordVisitor<T>(PhantomData<T>);

    impl<T: FromStr<Err: fmt::Display>> Visitor<'_> for WordVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a word or a whole number")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            text.parse().map_err(E::custom)
        }

        fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }

        fn visit_i64<E: de::Error>(self, number: i64) -> Result<T, E> {
            self.visit_str(&number.to_string())
        }
    }

    deserializer.deserialize_any(WordVisitor(PhantomData))
}

/// `Deserialize` for an option inside a configuration file: a table of its keys, or the text one would write on the
/// command line, with `positional` as in [`parse`].
pub fn table_or_text<'de, T, D>(deserializer: D, positional: Option<&'static str>) -> Result<T, D::Error>
where
    T: DeserializeOwned,
    D: Deserializer<'de>,
{
    struct EitherVisitor<T>(Option<&'static str>, PhantomData<T>);

    impl<'de, T: DeserializeOwned> Visitor<'de> for EitherVisitor<T> {
        type Value = T;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("a table, or text of the form key=value,...")
        }

        fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
            parse(text, self.0).map_err(E::custom)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map))
        }
    }

    deserializer.deserialize_any(EitherVisitor(positional, PhantomData))
}

/// The candidate most like `word`, if any is near enough to be meant.
pub fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    candidates
        .into_iter()
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        .filter(|(distance, candidate)| *distance <= (candidate.len() / 3).max(1))
        .min()
        .map(|(_, candidate)| candidate)
}

/// `" (did you mean 'x'?)"`, or nothing.
pub fn did_you_mean<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> String {
    nearest(word, candidates).map_or_else(String::new, |near| format!(" (did you mean '{near}'?)"))
}

/// Puts a word where its key says: one with a dot into the table before the dot.
fn insert(pairs: &mut Vec<(String, Value)>, path: &str, word: Word) -> Result<(), OptionError> {
    let (key, rest) = path.split_once('.').map_or((path, None), |(key, rest)| (key, Some(rest)));
    let known = pairs.iter().position(|(known, _)| known == key);
    match (known.map(|at| &mut pairs[at].1), rest) {
        (None, None) => pairs.push((key.to_owned(), Value::Word(word))),
        (None, Some(rest)) => {
            let mut table = Vec::new();
            insert(&mut table, rest, word)?;
            pairs.push((key.to_owned(), Value::Table(key.to_owned(), table)));
        }
        (Some(Value::Table(_, table)), Some(rest)) => insert(table, rest, word)?,
        (Some(Value::Words(words)), None) => words.push(word),
        (Some(known @ Value::Word(_)), None) => {
            let Value::Word(first) = std::mem::replace(known, Value::Words(Vec::new())) else {
                return Ok(());
            };
            *known = Value::Words(vec![first, word]);
        }
        (Some(_), _) => return Err(given_twice(&word.key)),
    }
    Ok(())
}

fn given_twice(key: &str) -> OptionError {
    OptionError(format!("'{key}' is given twice"))
}

fn is_key(word: &str) -> bool {
    let is_part = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
    };
    word.split('.').all(is_part)
}

/// A key in the spelling of other programs: it is refused, with the nearest one.
fn is_nearly_a_key(word: &str) -> bool {
    is_key(&word.to_ascii_lowercase().replace('_', "-"))
}

fn split_commas(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        if c != ',' {
            words.last_mut().expect("starts with one word").push(c);
        } else if chars.next_if_eq(&',').is_some() {
            words.last_mut().expect("starts with one word").push(',');
        } else {
            words.push(String::new());
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// What a key is given.
enum Value {
    Word(Word),
    /// The key was given several times, which only a list's may be.
    Words(Vec<Word>),
    /// With the key that leads to it.
    Table(String, Vec<(String, Value)>),
}

/// One value, with its key for the messages.
struct Word {
    key: String,
    text: String,
    /// It was not written down: the key alone was.
    bare: bool,
}

impl Word {
    fn number<N: FromStr<Err = ParseIntError> + fmt::Display>(&self, most: N) -> Result<N, OptionError> {
        let Self { key, text, .. } = self;
        self.demand_value("N")?;
        text.parse().map_err(|error: ParseIntError| {
            let limit = match error.kind() {
                IntErrorKind::PosOverflow => format!(": it is at most {most}"),
                _ => String::new(),
            };
            OptionError(format!("{key}: '{text}' is no valid number{limit}"))
        })
    }

    /// Refuses a key alone, where only a switch could be one.
    fn demand_value(&self, form: &str) -> Result<(), OptionError> {
        let key = &self.key;
        if self.bare { Err(OptionError(format!("'{key}' needs a value: {key}={form}"))) } else { Ok(()) }
    }

    /// Puts the key in front of what the value's own type complains of.
    fn named<V>(key: &str, result: Result<V, OptionError>) -> Result<V, OptionError> {
        result.map_err(|OptionError(text)| OptionError(format!("{key}: {text}")))
    }
}

impl OptionError {
    /// Says which table it is about, if it does not already.
    fn within(self, table: &str) -> Self {
        let named = self.0.strip_prefix(table).is_some_and(|rest| rest.starts_with('.'));
        if named { self } else { Self(format!("{table}: {}", self.0)) }
    }
}

impl de::Error for OptionError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self(message.to_string())
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let near = did_you_mean(field, expected.iter().copied());
        Self(format!("unknown key '{field}'{near}; the keys are: {}", expected.join(", ")))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        let near = did_you_mean(variant, expected.iter().copied());
        Self(format!("'{variant}' is not one of: {}{near}", expected.join(", ")))
    }

    fn missing_field(field: &'static str) -> Self {
        Self(format!("'{field}=' is missing"))
    }
}

impl<'de> IntoDeserializer<'de, OptionError> for Word {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

impl<'de> IntoDeserializer<'de, OptionError> for Value {
    type Deserializer = Self;

    fn into_deserializer(self) -> Self {
        self
    }
}

macro_rules! by_kind {
    ($($method:ident ( $($arg:ident : $ty:ty),* );)*) => {$(
        fn $method<V: Visitor<'de>>(self, $($arg: $ty,)* visitor: V) -> Result<V::Value, OptionError> {
            match self {
                Self::Word(word) => word.$method($($arg,)* visitor),
                Self::Words(words) => Err(given_twice(&words[0].key)),
                Self::Table(key, table) => visitor
                    .visit_map(MapDeserializer::new(table.into_iter()))
                    .map_err(|error| error.within(&key)),
            }
        }
    )*};
}

impl<'de> Deserializer<'de> for Value {
    type Error = OptionError;

    by_kind! {
        deserialize_u8(); deserialize_u16(); deserialize_u32(); deserialize_u64();
        deserialize_i8(); deserialize_i16(); deserialize_i32(); deserialize_i64();
        deserialize_any(); deserialize_bool();
        deserialize_enum(name: &'static str, variants: &'static [&'static str]);
        deserialize_struct(name: &'static str, fields: &'static [&'static str]);
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        let words = match self {
            Self::Word(word) => vec![word],
            Self::Words(words) => words,
            Self::Table(..) => return self.deserialize_any(visitor),
        };
        visitor.visit_seq(SeqDeserializer::new(words.into_iter()))
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct map identifier
        ignored_any
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident $type:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
            visitor.$visit(self.number($type::MAX)?)
        }
    )*};
}

impl<'de> Deserializer<'de> for Word {
    type Error = OptionError;

    numbers!(deserialize_u8 visit_u8 u8, deserialize_u16 visit_u16 u16, deserialize_u32 visit_u32 u32,
        deserialize_u64 visit_u64 u64, deserialize_i8 visit_i8 i8, deserialize_i16 visit_i16 i16,
        deserialize_i32 visit_i32 i32, deserialize_i64 visit_i64 i64);

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        self.demand_value("...")?;
        Self::named(&self.key, visitor.visit_string(self.text))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        match switch(&self.text) {
            Some(value) => visitor.visit_bool(value),
            None => Err(OptionError(format!("{}: '{}' is neither on nor off", self.key, self.text))),
        }
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, OptionError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _name: &'static str,
        fields: &'static [&'static str],
        _visitor: V,
    ) -> Result<V::Value, OptionError> {
        let (key, example) = (&self.key, fields.first().copied().unwrap_or("KEY"));
        Err(OptionError(format!(
            "'{key}' has no value but keys of its own: {key}.{example}=VALUE and so on; the keys are: {}",
            fields.join(", ")
        )))
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _name: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, OptionError> {
        if !variants.contains(&ON) {
            self.demand_value(&variants.join("|"))?;
        }
        Self::named(&self.key, visitor.visit_enum(self.text.into_deserializer()))
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct seq tuple tuple_struct map identifier
        ignored_any
    }
}

#[cfg(test)]
mod tests;
