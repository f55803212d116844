// Plain text tables for the terminal.
#pragma once

#include <cstdio>
#include <string>
#include <vector>

namespace sonicmoe::cli {

/// Columns are as wide as their widest cell; the first `left_columns` are left-aligned, the others
/// right-aligned. Cells are ASCII.
class Table {
 public:
  explicit Table(std::vector<std::string> header, std::size_t left_columns = 1)
      : left_columns_(left_columns), rows_{std::move(header)} {}

  void add_row(std::vector<std::string> cells) { rows_.push_back(std::move(cells)); }
  void print(std::FILE* file = stdout) const;

 private:
  std::size_t left_columns_;
  std::vector<std::vector<std::string>> rows_;  // the header first
};

/// One line on stderr that is overwritten by the next; silent when stderr is no terminal.
class Progress {
 public:
  explicit Progress(bool enabled);
  ~Progress() { clear(); }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void show(const std::string& line);
  void clear();

 private:
  bool enabled_;
  bool shown_ = false;
};

}  // namespace sonicmoe::cli
