//! The configuration file: TOML in, [`Settings`] out. A refusal is one line that names the file's line, the key, what
//! it may be and the nearest word, in the words of the command line.
//!
//! Not `toml::from_str`: its errors echo the file over five lines and speak of Rust's types.

use std::fmt;
use std::ops::Range;
use std::slice;

use cleave_common::options::{self, OptionError};
use serde::Deserialize;
use serde::de::value::StrDeserializer;
use serde::de::{
    self, DeserializeSeed, Deserializer, IntoDeserializer, MapAccess, SeqAccess, Unexpected, Visitor,
};
use serde::forward_to_deserialize_any;
use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use super::Settings;

/// Why a text is no configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileError {
    /// Counted from 1.
    line: Option<usize>,
    /// The keys on the way to what is wrong, outermost first.
    keys: Vec<String>,
    what: String,
}

/// Reads the text of a configuration file.
pub fn parse(text: &str) -> Result<Settings, FileError> {
    let table = DeTable::parse(text).map_err(|error| FileError::syntax(text, &error))?;
    let at = table.span();
    let root = DeValue::Table(table.into_inner());
    Settings::deserialize(Node { text, at, value: &root })
}

impl FileError {
    fn new(what: impl fmt::Display) -> Self {
        Self { line: None, keys: Vec::new(), what: what.to_string() }
    }

    fn syntax(text: &str, error: &toml::de::Error) -> Self {
        let span = error.span().unwrap_or_default();
        let word = text
            .get(span.clone())
            .filter(|word| word.len() <= 40 && word.bytes().all(|b| b.is_ascii_graphic()));
        let near =
            word.filter(|word| !word.is_empty()).map_or_else(String::new, |word| format!(", at '{word}'"));
        Self::new(format_args!("this is no TOML: {}{near}", error.message())).at(text, span)
    }

    /// The innermost place counts.
    fn at(mut self, text: &str, span: Range<usize>) -> Self {
        let before = &text.as_bytes()[..span.start.min(text.len())];
        self.line.get_or_insert(1 + before.iter().filter(|byte| **byte == b'\n').count());
        self
    }

    fn inside(mut self, key: &str) -> Self {
        self.keys.insert(0, key.to_owned());
        self
    }
}

impl std::error::Error for FileError {}

impl fmt::Display for FileError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let line = self.line.map_or_else(String::new, |line| format!("line {line}: "));
        let keys: String = self.keys.iter().map(|key| format!("{key}: ")).collect();
        let said = format!("{line}{keys}{}", self.what);
        // What the file says is quoted, and it may be anything.
        said.chars().try_for_each(|c| {
            if c.is_control() { write!(f, "{}", c.escape_default()) } else { write!(f, "{c}") }
        })
    }
}

impl de::Error for FileError {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::new(message)
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn de::Expected) -> Self {
        let found = match found {
            Unexpected::Bool(value) => value.to_string(),
            Unexpected::Unsigned(number) => number.to_string(),
            Unexpected::Signed(number) => number.to_string(),
            Unexpected::Float(number) => number.to_string(),
            Unexpected::Str(text) => quote(text),
            Unexpected::Seq => "a list".to_owned(),
            _ => "a table".to_owned(),
        };
        Self::new(format_args!("{found} is given where there has to be {expected}"))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        Self::new(OptionError::unknown_field(field, expected))
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(OptionError::unknown_variant(variant, expected))
    }

    fn missing_field(field: &'static str) -> Self {
        Self::new(format_args!("'{field}' is missing"))
    }
}

fn quote(text: &str) -> String {
    const MOST: usize = 60;
    let shown: String = text.chars().take(MOST).collect();
    let rest = if shown.len() < text.len() { "..." } else { "" };
    format!("'{shown}{rest}'")
}

/// A value, and where it stands.
struct Node<'a> {
    text: &'a str,
    at: Range<usize>,
    value: &'a DeValue<'a>,
}

impl<'a> Node<'a> {
    fn of(text: &'a str, value: &'a Spanned<DeValue<'a>>) -> Self {
        Self { text, at: value.span(), value: value.get_ref() }
    }

    fn refuse(&self, what: &str) -> FileError {
        let found = match self.value {
            DeValue::String(text) => quote(text),
            DeValue::Integer(number) => number.to_string(),
            DeValue::Float(number) => number.to_string(),
            DeValue::Boolean(value) => value.to_string(),
            DeValue::Datetime(time) => time.to_string(),
            DeValue::Array(_) => "a list".to_owned(),
            DeValue::Table(_) => "a table".to_owned(),
        };
        FileError::new(format_args!("{found} {what}")).at(self.text, self.at.clone())
    }

    fn integer(&self) -> Result<i128, FileError> {
        let number = |number: &DeInteger<'_>| i128::from_str_radix(number.as_str(), number.radix()).ok();
        self.value
            .as_integer()
            .and_then(number)
            .ok_or_else(|| self.refuse("is no valid number: it has to be a whole one"))
    }

    fn number<N: TryFrom<i128>>(&self) -> Result<N, FileError> {
        N::try_from(self.integer()?).map_err(|_| self.refuse("is no valid number: it is out of range"))
    }
}

macro_rules! numbers {
    ($($method:ident $visit:ident),*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
            visitor.$visit(self.number()?)
        }
    )*};
}

impl<'de> Deserializer<'de> for Node<'_> {
    type Error = FileError;

    numbers!(deserialize_u8 visit_u8, deserialize_u16 visit_u16, deserialize_u32 visit_u32,
        deserialize_u64 visit_u64, deserialize_i8 visit_i8, deserialize_i16 visit_i16,
        deserialize_i32 visit_i32, deserialize_i64 visit_i64);

    /// For types that take several forms, and say so themselves.
    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        match self.value {
            DeValue::String(text) => visitor.visit_str(text),
            DeValue::Integer(_) => visitor.visit_i64(self.number()?),
            DeValue::Boolean(value) => visitor.visit_bool(*value),
            DeValue::Float(_) | DeValue::Datetime(_) => {
                Err(self.refuse("is neither text in quotes nor a whole number"))
            }
            DeValue::Array(_) => self.deserialize_seq(visitor),
            DeValue::Table(_) => self.deserialize_map(visitor),
        }
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        let value = match self.value {
            DeValue::Boolean(value) => Some(*value),
            DeValue::String(word) => options::switch(word),
            _ => None,
        };
        visitor.visit_bool(value.ok_or_else(|| self.refuse("is neither true nor false"))?)
    }

    fn deserialize_str<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        visitor.visit_str(self.value.as_str().ok_or_else(|| self.refuse("is no text: write it in quotes"))?)
    }

    fn deserialize_string<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        self.deserialize_str(visitor)
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, FileError> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FileError> {
        match self.value.as_str() {
            Some(word) => visitor.visit_enum(word.into_deserializer()),
            None => Err(self.refuse(&format!("is not one of: {}", variants.join(", ")))),
        }
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        match self.value {
            DeValue::Array(values) => visitor.visit_seq(Elements { text: self.text, rest: values.iter() }),
            _ => Err(self.refuse("is no list: write [...], or begin each of them with a line [[...]]")),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, FileError> {
        match self.value {
            DeValue::Table(table) => {
                visitor.visit_map(Entries { text: self.text, rest: Box::new(table.iter()), value: None })
            }
            _ => Err(self.refuse("is no table of keys: write { key = value, ... }")),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, FileError> {
        self.deserialize_map(visitor)
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char bytes byte_buf unit unit_struct tuple tuple_struct identifier ignored_any
    }
}

struct Elements<'a> {
    text: &'a str,
    rest: slice::Iter<'a, Spanned<DeValue<'a>>>,
}

impl<'de> SeqAccess<'de> for Elements<'_> {
    type Error = FileError;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, FileError> {
        let Some(value) = self.rest.next() else { return Ok(None) };
        seed.deserialize(Node::of(self.text, value))
            .map(Some)
            .map_err(|error| error.at(self.text, value.span()))
    }
}

type Entry<'a> = (&'a Spanned<toml::de::DeString<'a>>, &'a Spanned<DeValue<'a>>);

struct Entries<'a> {
    text: &'a str,
    rest: Box<dyn Iterator<Item = Entry<'a>> + 'a>,
    /// Whose key was read last.
    value: Option<Entry<'a>>,
}

impl<'de> MapAccess<'de> for Entries<'_> {
    type Error = FileError;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, FileError> {
        self.value = self.rest.next();
        let Some((key, _)) = self.value else { return Ok(None) };
        let word: StrDeserializer<'_, FileError> = key.get_ref().as_ref().into_deserializer();
        seed.deserialize(word).map(Some).map_err(|error| error.at(self.text, key.span()))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, FileError> {
        let (key, value) = self.value.take().ok_or_else(|| FileError::new("a value without a key"))?;
        seed.deserialize(Node::of(self.text, value))
            .map_err(|error| error.at(self.text, value.span()).inside(key.get_ref()))
    }
}
