#include "cli/table.hpp"

#include <algorithm>

#include "cli/output.hpp"

namespace sonicmoe::cli {

void Table::print(std::FILE* file) const {
  std::vector<std::size_t> widths;
  for (const auto& row : rows_) {
    widths.resize(std::max(widths.size(), row.size()), 0);
    for (std::size_t i = 0; i < row.size(); ++i) widths[i] = std::max(widths[i], row[i].size());
  }
  for (std::size_t r = 0; r < rows_.size(); ++r) {
    std::string line;
    for (std::size_t i = 0; i < rows_[r].size(); ++i) {
      const std::string& cell = rows_[r][i];
      const std::string gap(widths[i] - cell.size(), ' ');
      line += (i ? "  " : "") + (i < left_columns_ ? cell + gap : gap + cell);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    std::fprintf(file, "%s\n", (r == 0 ? styled(file, kBold, line) : line).c_str());
    if (r == 0) {
      std::size_t total = 2 * (widths.size() - 1);
      for (const std::size_t width : widths) total += width;
      std::fprintf(file, "%s\n", std::string(total, '-').c_str());
    }
  }
}

Progress::Progress(bool enabled) : enabled_(enabled && is_terminal(stderr)) {}

void Progress::show(const std::string& line) {
  if (!enabled_) return;
  std::fprintf(stderr, "\r\033[K%s", line.c_str());
  std::fflush(stderr);
  shown_ = true;
}

void Progress::clear() {
  if (!shown_) return;
  std::fputs("\r\033[K", stderr);
  shown_ = false;
}

}  // namespace sonicmoe::cli
